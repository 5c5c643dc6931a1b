"""Independent check of a sweep: one head's effect, computed again with a PyTorch hook.

It runs once for every state of a model, before the first measurement. A hook knocks out a head of
one prompt in a plain forward of the transformers model. This forward shares no code with the
sweep: no trace, no padding, no rows, and of the adapter only the output projection's location.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..errors import CheckError
from ..head import Head
from ..models.rounding import Rounding
from ..results.findings import Findings
from ..walk.batch import make_batch
from ..walk.judge import likely_cause, proved_batch
from ..walk.not_finite import FINITE, watch
from .prepare import prepare_sweep

if TYPE_CHECKING:
    from ..models import Model
    from ..prompts import Prompts

CANDIDATES = 8
"""Number of heads to sweep; the hook knocks out the one with the largest effect."""

TRIED = 3
"""Number of prompts to try, if numbers are not finite."""

SMALL = 1e-3
"""Smallest scale of an error beside the model's largest logit: labels' own logits may be 0."""

KEY = ("second forward",)
"""Key of the result in the model's cache, which is emptied when the state changes."""


def prove_state(model: Model, prompts: Prompts) -> None:
    """Compare sweep and hook for the model's current state, unless this was done before.

    Parameters
    ----------
    model
        The model. Skipped for a model on a server, which accepts no hooks, and for a model with
        active interventions that sweeps refuse.
    prompts
        Prompts, of which the shortest is used.

    Raises
    ------
    CheckError
        If the two numbers differ by more than rounding allows.
    """
    if model.remote or (model.state is not None and model.state.unfollowed()):
        return
    if KEY not in model.cache:
        under_way, model.proof = model.proof, Findings()
        try:
            model.cache[KEY] = _on_one_of(model, prompts)
            under_way.unsteady |= model.proof.unsteady
        finally:
            model.proof = under_way
    found = model.proof.second_forward = model.cache[KEY]
    if found and found["error"] > found["allowed"]:
        model.proof.unsteady.add("second forward")


def _on_one_of(model: Model, prompts: Prompts) -> dict[str, Any]:
    """Return the comparison on the shortest prompt with finite numbers, or an empty dict."""
    for number in np.argsort(prompts.lengths, kind="stable")[:TRIED]:
        found = _compare(model, prompts[[int(number)]])
        if found:
            return found
    return {}


def _compare(model: Model, prompt: Prompts) -> dict[str, Any]:
    prompt = prompt.first_tokens()
    heads = _candidates(model)
    make = prepare_sweep(model, prompt, groups=[(head,) for head in heads])
    batch = make_batch(model, prompt, np.arange(1))
    recorders = [make(batch), watch(batch, [])]
    swept, seen = proved_batch(model, batch, recorders)
    drops = swept["margin_drop"][0].numpy()
    if not seen[FINITE].all() or not np.isfinite(drops).all():
        return {}
    strongest = int(np.abs(drops).argmax())
    head = heads[strongest]
    (clean, largest), (without, _) = (_logits(model, prompt, out) for out in (None, head))
    gold = int(prompt.gold_index[0])
    error = abs(_margin(clean, gold) - _margin(without, gold) - float(drops[strongest]))
    size = max(float(np.abs([clean, without]).max()), SMALL * largest)
    allowed = Rounding.of(model).forward(model.dtype, model.n_layers)
    error /= max(size, float(np.finfo(np.float32).tiny))
    if not error <= allowed and not Rounding.is_unsteady(model, error):
        raise CheckError(
            f"{model.name}: knocking out head {head} in a forward of the transformers model lowers "
            f"the margin by {_margin(clean, gold) - _margin(without, gold):.4g}, in the sweep by "
            f"{drops[strongest]:.4g} (error {error:.2g} of the largest label logit, at "
            f"most {allowed:.2g} is accepted). {likely_cause(model, 'unchanged row')}"
        )
    return {
        "head": str(head),
        "margin_drop": float(f"{drops[strongest]:.4g}"),
        "error": float(f"{error:.3g}"),
        "allowed": float(f"{allowed:.3g}"),
    }


def _candidates(model: Model) -> list[Head]:
    """Return a few random heads of the model, the same ones for the same shape."""
    heads = model.heads
    rng = np.random.default_rng([model.n_layers, model.n_heads])
    numbers = rng.choice(len(heads), size=min(CANDIDATES, len(heads)), replace=False)
    return sorted(heads[number] for number in numbers)


def _margin(logits: Sequence[float] | np.ndarray, gold: int) -> float:
    if len(logits) == 1:
        return float(logits[0])
    others = np.delete(np.asarray(logits), gold)
    return float(logits[gold] - others.max())


def _logits(model: Model, prompt: Prompts, out: Head | None) -> tuple[np.ndarray, float]:
    """Return the answers' logits and the largest, with a head's output zero at the last position.

    Of one answer, return its log-probability.
    """
    ids = torch.as_tensor(prompt.token_id, device=model.device)
    inputs = {"input_ids": ids, "use_cache": False, "return_dict": True}
    with torch.no_grad(), _without(model, out):
        logits = model.module(**inputs).logits[0, -1]
    largest = float(logits.double().nan_to_num(0, 0, 0).abs().max())
    if prompt.answers.alone:
        logits = logits.double().log_softmax(dim=-1)
    labels: np.ndarray = logits[prompt.answers.first[0].tolist()].double().cpu().numpy()
    return labels, largest


@contextmanager
def _without(model: Model, head: Head | None) -> Iterator[None]:
    if head is None:
        yield
        return
    block = model.architecture.layers(model.module)[head.layer]

    own = threading.get_ident()

    def zero(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[Any, ...]:
        if threading.get_ident() != own:  # a forward of the user's, beside the measure
            return inputs
        z = inputs[0].clone()
        size = z.shape[-1] // model.heads_in(head.layer)
        z[:, -1, head.head * size : (head.head + 1) * size] = 0
        return (z, *inputs[1:])

    handle = model.architecture.projection(block).register_forward_pre_hook(zero)
    try:
        yield
    finally:
        handle.remove()
