"""What kind of head each is: scores from the literature, and names by thresholds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float

from ..checks import check_is, whole
from ..edits.changes import Mean
from ..models.architecture import call
from ..models.rounding import Rounding
from ..prompts.repeats import random_repeats
from ..walk.attended import claim_attention
from ..walk.batch import Batch
from ..walk.not_finite import FINITE
from ..walk.proof import Claim
from ..walk.readout import Readout, get_readout
from ..walk.recorder import Recorder
from ..walk.scores import attention, scores
from ..walk.tensors import stack_heads
from ..walk.views import End, LayerView
from .attribution import Attribution
from .choose import above_others
from .collect import collect
from .copying import own_token_ends
from .datasets import dataset, measured_dataset
from .effects import Effects
from .measure import MakeRecorder, Measure
from .measurement import measurement
from .ov import LabelValues
from .qk import Similarity
from .scores import scores_by_prompt

if TYPE_CHECKING:
    import xarray as xr

    from ..models import Model
    from ..prompts import Prompts

COPIED = 64
"""Number of positions at which copying is tested."""

KINDS: dict[str, tuple[str, float]] = {
    "previous token": ("previous_token", 0.4),
    "duplicate token": ("duplicate_token", 0.2),
    "induction": ("induction", 0.2),
    "sink": ("sink", 0.5),
    "copying": ("copying", 0.5),
    "suppression": ("suppression", 0.5),
    "function vector": ("function_vector", 0.05),
    "writer": ("answer_logit", 0.1),
    "suppressor": ("answer_logit", -0.1),
}
"""Kinds with their score and the least value; for a negative one, the largest. The score's whole
interval must be beyond 0 too.

They are set by hand and were compared with three kinds of models. In 16 planted models of four
families (`twotower.testing.PlantedKinds`, noise 0.05) all 320 heads get the planted names and no
others. In random GPT-2, GPT-NeoX and Llama models of 36 heads no head is named. With matrices
three times as large three of 108 are, all of them function vectors: with 10 prompts the intervals
of scores that need a task are wide, and a head without effect is beyond 0 in one of 40 cases. The
other scores stay far below their thresholds there (previous token 0.07, duplicate token and
induction 0.03, sink 0.06, copying 0, suppression 0.02). SmolLM2-135M (270 heads, 10 prompts of
capitals) has 12 induction heads, the strongest 0.86, 0.75, 0.70 and 0.70, 62 sinks, and one
suppression head (0.58); none of its heads reaches the threshold of copying, which only heads that
copy most tokens do (the largest is 0.44)."""


@measurement
def _measured(model: Model, prompts: Prompts, measure: Measure) -> dict[str, np.ndarray]:
    return collect(model, prompts, [measure])[0]


def head_kinds(
    model: Model,
    prompts: Prompts | None = None,
    *,
    n: int = 16,
    length: int = 25,
    seed: int = 0,
) -> xr.Dataset:
    """Return scores of what each head does, and the names of kinds whose thresholds it reaches.

    Parameters
    ----------
    model
        The model.
    prompts
        Prompts for the scores that need a task; None to leave them out.
    n, length
        Number of random sequences, and of different tokens in each; each is repeated once.
    seed
        Seed of the sequences, and of the shuffled labels.

    Returns
    -------
    xarray.Dataset
        (layer, head): previous_token, duplicate_token, induction, sink, copying, suppression; with
        prompts also answer_logit and answer_effect; if each has two or more demonstrations also
        function_vector; with prompts of classes also qk_auc, ov_auc and beside each its size
        (qk_size, ov_size); for each `<score>_error`, half
        the width of its 95% interval over sequences or prompts; and `kind`, the names, separated by
        commas. Thresholds are `twotower.measures.head_kinds.KINDS`.

    Raises
    ------
    InputError
        If the vocabulary or the context is too small for the sequences.
    """
    check_is(model, "Model", "model")
    if prompts is not None:
        check_is(prompts, "Prompts", "prompts")
    for name, value in (("n", n), ("length", length)):
        whole(name, value, 2)
    repeats = random_repeats(model, n, length, whole("seed", seed))
    by_prompt = dict(_measured(model, repeats, _Patterns(length)))
    by_prompt.pop(FINITE)
    measured = repeats
    if prompts is not None:
        measured = prompts
        by_prompt |= _of_task(model, prompts, seed)
    arrays: dict[str, np.ndarray] = {}
    for name, values in by_prompt.items():
        arrays[name], arrays[f"{name}_error"] = _mean_and_error(values)
    arrays["kind"] = _names(arrays)
    settings = {
        "sequences": n,
        "length": length,
        "seed": seed,
        "n_prompts": 0 if prompts is None else len(prompts),
        "thresholds": {kind: list(rule) for kind, rule in KINDS.items()},
    }
    return dataset("kinds", arrays, model, measured, settings)


def _of_task(model: Model, prompts: Prompts, seed: int) -> dict[str, np.ndarray]:
    """Return (prompt, layer, head) scores that need a task."""
    classes = not prompts.answers.by_prompt and len(prompts.labels) > 1
    measures: list[Measure] = [Attribution(), Effects(logprobs=False)]
    if classes:
        measures += [Similarity("labels"), LabelValues(keep="labels")]
    direct, effects, *towers = collect(model, prompts, measures)
    written = measured_dataset(measures[0], direct, model, prompts)["label_logit"]
    found = {
        "answer_logit": above_others(written).transpose("prompt", "layer", "head").values,
        "answer_effect": effects["margin_drop"],
    }
    if (prompts.n_demonstrations > 1).all():
        shuffled = prompts.shuffled_labels(seed)
        changed = _measured(model, shuffled, Effects(to=Mean(prompts)))
        right = (np.arange(len(prompts)), ..., prompts.gold_index)
        found["function_vector"] = -changed["logprob_drop"][right]
    if classes:
        qk, ov = (
            measured_dataset(measure, arrays, model, prompts)
            for measure, arrays in zip(measures[2:], towers, strict=True)
        )
        found |= scores_by_prompt(qk["score"], ov["label_logit"])
    return found


def _mean_and_error(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the mean over the first axis and half the width of its 95% interval, without NaN."""
    from scipy.stats import t

    known = np.isfinite(values)
    count = known.sum(axis=0)
    total = np.where(known, values, 0).sum(axis=0, dtype=np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = total / count
        squares = np.where(known, values - mean, 0) ** 2
        spread = np.sqrt(squares.sum(axis=0) / (count - 1))
        error = t.ppf(0.975, np.maximum(count - 1, 1)) * spread / np.sqrt(count)
    return mean.astype(np.float32), error.astype(np.float32)


def _names(arrays: dict[str, np.ndarray]) -> np.ndarray:
    """Return (layer, head) names of the kinds whose thresholds a head reaches."""
    shape = arrays["induction"].shape
    named: list[list[str]] = [[] for _ in range(int(np.prod(shape)))]
    for kind, (score, least) in KINDS.items():
        if score not in arrays:
            continue
        values, errors = arrays[score].ravel(), arrays[f"{score}_error"].ravel()
        sign = 1 if least > 0 else -1
        reached = (sign * values >= abs(least)) & (sign * values - errors > 0)
        for number in np.flatnonzero(reached):
            named[number].append(kind)
    return np.array([", ".join(kinds) for kinds in named], dtype=object).reshape(shape)


@dataclass(frozen=True)
class _Patterns(Measure):
    """Attention patterns and copying on repeated random sequences."""

    group = "kinds"
    length: int = 0

    def prepare(self, model: Model, prompts: Prompts) -> MakeRecorder:
        readout = get_readout(model, prompts.answers.vocabulary)
        rng = np.random.default_rng([prompts.seed or 0, 32])
        first = np.flatnonzero(prompts.role[0] == "text")
        per = max(1, COPIED // len(prompts))
        chosen = np.stack([rng.permutation(first)[:per] for _ in range(len(prompts))])
        start = int(first[0])
        rounding = Rounding.of_proof(model)
        return lambda batch: PatternsRecorder(
            batch, self.length, start, chosen[batch.rows], readout, rounding
        )


class PatternsRecorder(Recorder):
    """Records attention patterns, and whether heads copy or suppress tokens.

    Parameters
    ----------
    batch
        A batch of repeated sequences of equal length.
    length
        Number of tokens before the repetition.
    start
        Column of the first of them.
    chosen
        (B, P) columns at which copying is tested.
    readout
        Readout of the model, for norms after attention.
    rounding
        Errors that the model's arithmetic allows; None to leave out the proof.
    """

    group = "kinds"

    def __init__(
        self,
        batch: Batch,
        length: int,
        start: int,
        chosen: np.ndarray,
        readout: Readout,
        rounding: Rounding | None,
    ) -> None:
        self.length, self.start, self.weights = length, start, readout
        self.chosen = batch.everywhere(chosen)
        tokens = batch.input_ids.cpu().numpy()
        self.tokens = batch.everywhere(np.take_along_axis(tokens, chosen, axis=1))
        self.found: dict[str, list[torch.Tensor]] = {}
        self.rounding = rounding
        self.claims: list[Claim] = []
        self.vectors: list[torch.Tensor] = []

    def layer(self, view: LayerView) -> None:
        width = view.z.shape[1]
        plain = scores(view, width)
        pattern = attention(view, plain)
        if self.rounding is not None:
            self.claims.append(claim_attention(view, plain, pattern, self.rounding))
        n, start = self.length, self.start
        second = slice(start + n, None)
        parts = {
            "previous_token": pattern[:, :, start + 1 :].diagonal(start, dim1=2, dim2=3),
            "duplicate_token": pattern[:, :, second].diagonal(start, dim1=2, dim2=3),
            "induction": pattern[:, :, second].diagonal(start + 1, dim1=2, dim2=3),
            "sink": pattern[:, :, second, 0],
        }
        for name, values in parts.items():
            self.found.setdefault(name, []).append(values.mean(dim=-1))
        self.vectors.append(self._vectors(view))

    def _vectors(self, view: LayerView) -> Float[torch.Tensor, "B H P d_model"]:
        """Return the heads' raw value-output vectors at the chosen positions."""
        n_heads, (n_kv, size) = view.z.shape[2], view.value.shape[2:]
        chosen = self.chosen.on(view.value.device)
        index = chosen[:, :, None, None].expand(-1, -1, n_kv, size)
        value = view.value.gather(1, index).repeat_interleave(n_heads // n_kv, dim=2)
        if view.gate is not None:
            gate = view.gate
            at = chosen[:, :, None, None].expand(-1, -1, *gate.shape[2:])
            value = value * gate.gather(1, at)
        eye = torch.eye(n_heads, dtype=value.dtype, device=value.device)
        alone = value.transpose(1, 2).unsqueeze(3) * eye[:, None, :, None]  # (B, H, P, H, D)
        projection = view.architecture.projection(view.block)
        nothing = call(projection, torch.zeros_like(alone[:1, :1, :1]).flatten(-2))
        output = call(projection, alone.flatten(-2)) - nothing
        return self.weights.write(view, output)

    def finish(self, end: End) -> dict[str, torch.Tensor]:
        found = {name: stack_heads(values, end) for name, values in self.found.items()}
        device = end.residual.device
        norm = self.weights.on(device).norm
        tokens, rows = [], []
        for vectors in self.vectors:
            own = vectors.to(device)
            ones = torch.ones(own.shape[:3], device=device)
            rows.append((self.weights.frozen_norm(own, ones) - norm.shift).flatten(0, 2))
            tokens.append(self.tokens.on(device)[:, None].expand(own.shape[:3]).flatten())
        self.vectors.clear()
        copied, suppressed = own_token_ends(torch.cat(rows), torch.cat(tokens), end)
        sizes = [len(own) for own in rows]
        n, per = self.tokens.own.shape
        for name, ends in (("copying", copied), ("suppression", suppressed)):
            layers = [x.view(n, -1, per).mean(dim=-1) for x in ends.split(sizes)]
            found[name] = stack_heads(layers, end)
        return found
