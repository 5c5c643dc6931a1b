"""Check that a batch changes nothing: a prompt in it, padded or not, computes as by itself.

It runs the transformers model alone, without a trace, once for every state of the model and for
every length at which its configuration says that attention changes. It finds models that count
columns instead of tokens or mix prompts, and hooks that do.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float

from ..errors import CheckError
from ..models.length_settings import named_lengths
from ..models.rounding import Rounding
from ..results.findings import Finding
from .batch import Batch, make_batch

if TYPE_CHECKING:
    from ..models import Model
    from ..prompts import Prompts


def prove_padding(model: Model, prompts: Prompts, batch: Batch) -> None:
    """Compare a batch's shortest prompt beside its longest one and alone, unless it was done.

    Without padding, one comparison for each state is enough.

    Parameters
    ----------
    model
        The model. Skipped for a model on a server.
    prompts
        Prompts of the batch.
    batch
        The batch; of a single prompt there is nothing to compare.

    Raises
    ------
    CheckError
        If the logits of the shortest prompt's last token differ by more than rounding allows.
    """
    if model.remote or len(batch.rows) < 2:
        return
    lengths = batch.mask.own.sum(dim=1)
    order = lengths.argsort(stable=True)
    short, long = (int(batch.rows[int(i)]) for i in (order[0], order[-1]))
    ends = (int(lengths.min()), int(lengths.max()))
    named = named_lengths(model.config).values()
    key: tuple[Any, ...] = ("padding", *(sum(length < end for length in named) for end in ends))
    if ends[0] == ends[1]:  # nothing is padded, but prompts may be mixed
        done = [known for known in model.cache if known[0] == "padding"]
        key = done[0] if done else ("padding",)
    if key in model.cache:
        model.proof.add("padding", model.cache[key])
        if model.cache[key].strain > 1:
            model.proof.unsteady.add("padding")
        return
    alone = _logits(model, prompts, [short])
    padded = _logits(model, prompts, [short, long])
    if not alone.amax().isfinite():
        return
    known = alone.isfinite()  # a model may rule out tokens by a logit of minus infinity
    left = (alone - padded)[known].abs().max()
    error = float(left / alone[known].abs().max().clamp(min=1e-30))
    if padded[~known].isfinite().any():
        error = math.inf
    allowed = Rounding.of(model).forward(model.dtype, model.n_layers)
    if not error <= allowed and Rounding.is_unsteady(model, error):
        model.proof.unsteady.add("padding")
    elif not error <= allowed:  # NaN too
        how = f"padded from {ends[0]} to {ends[1]} tokens"
        cause = "counts columns and not tokens"
        if ends[0] == ends[1]:
            how, cause = "in a batch with another prompt", "mixes prompts"
        raise CheckError(
            f"{model.name}, prompt {short}: {how}, it has other logits than alone (error "
            f"{error:.2g}, at most {allowed:.2g} is accepted). The model, or a hook, {cause}. "
            "Measure prompts one at a time: tt.set_options(batch_size=1)"
        )
    model.cache[key] = Finding(error, allowed)
    model.proof.add("padding", model.cache[key])


def _logits(model: Model, prompts: Prompts, rows: list[int]) -> Float[torch.Tensor, " vocabulary"]:
    """Return the logits after the first of some prompts."""
    inputs = make_batch(model, prompts, np.array(rows)).inputs
    with torch.no_grad():
        logits: torch.Tensor = model.module(**inputs).logits
    return logits[0, -1].float()
