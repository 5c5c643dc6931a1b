"""Attribution patching: effects of all heads estimated from one gradient."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float

from ..checks import check_measured
from ..edits.changes import Change, Zero, check_change
from ..edits.prepared import BatchChange, prepare_change
from ..errors import InputError
from ..prompts.positions import named, position_mask
from ..prompts.sequences import with_answers
from ..results.missing import blank
from ..walk.batch import Batch
from ..walk.everywhere import Everywhere
from ..walk.not_finite import FINITE
from ..walk.recorder import Recorder
from ..walk.tensors import margin, stack_heads
from ..walk.views import End, LayerView
from .collect import collect, run
from .datasets import measured_dataset
from .measure import MakeRecorder, Measure
from .measurement import measurement
from .predictions import Predictions, answer_logprobs

if TYPE_CHECKING:
    import xarray as xr

    from ..models import Model
    from ..prompts import Prompts
    from ..prompts.positions import Positions


def attribution_patching(
    model: Model,
    prompts: Prompts,
    positions: Positions = "last",
    *,
    to: Change = Zero(),
) -> xr.Dataset:
    """Estimate the effect of changing every head, to first order.

    The estimate is the margin's gradient at a head's output z, times the change of z. It takes
    one forward and one backward for all heads, and a forward of the donors, if any. Use
    `agreement` to compare it with the exact sweep.

    Parameters
    ----------
    model, prompts, positions, to
        As in `head_effects`.

    Returns
    -------
    xarray.Dataset
        margin_drop (prompt, layer, head), as in `head_effects`. The recorded settings contain
        ``estimate: gradient``.

    Raises
    ------
    InputError
        As `head_effects`; or if the model is quantized.

    References
    ----------
    Nanda (2023), "Attribution patching: activation patching at industrial scale".
    """
    check_measured(model, prompts)
    measure = GradientEffects(positions, to)
    if not prompts.answers.several:
        return run(model, prompts, measure)
    return _of_answers(model, prompts, measure)


@measurement
def _of_answers(model: Model, prompts: Prompts, measure: GradientEffects) -> xr.Dataset:
    """Return the effects on margins of answers of several tokens.

    The margin's rival is the best other answer of the clean run, as in its gradient.
    """
    (clean,) = collect(model, prompts, [Predictions()])
    scores, gold = clean["logprob"].copy(), prompts.gold_index
    rows = np.arange(len(prompts))
    factors = np.zeros(scores.shape)
    factors[rows, gold] = 1
    if not prompts.answers.alone:
        scores[rows, gold] = -np.inf
        factors[rows, np.nan_to_num(scores, nan=-np.inf).argmax(axis=1)] = -1
    factors *= prompts.answers.weights
    sequences = with_answers(prompts)
    mine = np.arange(len(sequences))[:, None] == sequences.source[sequences.owner]
    by_sequence = np.where(mine, factors[sequences.owner], 0)
    (found,) = collect(model, sequences, [replace(measure, factors=by_sequence)])
    drops = np.zeros((len(prompts), *found["margin_drop"].shape[1:]), dtype=np.float32)
    np.add.at(drops, sequences.owner, found["margin_drop"])
    finite = np.isfinite(clean["margin"])
    np.logical_and.at(finite, sequences.owner, found[FINITE])
    arrays = {"margin_drop": blank(drops, finite), FINITE: finite}
    return measured_dataset(measure, arrays, model, prompts)


@dataclass(frozen=True, eq=False)
class GradientEffects(Measure):
    """The measure behind `attribution_patching`, with its settings.

    `factors` (sequence, label) weigh the log-probabilities of answers of several tokens.
    """

    group = "effects"
    gradients = True

    positions: Positions = "last"
    to: Change = Zero()
    factors: np.ndarray | None = None

    def __post_init__(self) -> None:
        check_change(self.to)

    def prepare(self, model: Model, prompts: Prompts) -> MakeRecorder:
        if model.quantization:
            raise InputError("gradients need a model that is not quantized; use head_effects")
        weights = chain(model.module.parameters(), model.module.buffers())
        if any(weight.is_inference() for weight in weights):
            raise InputError(
                "gradients need weights that were not made in torch.inference_mode(); load the "
                "model outside of it, or use head_effects"
            )
        at = position_mask(prompts, self.positions)
        if not at.any():
            raise InputError("positions are empty: nothing would be changed")
        change = prepare_change(self.to, model, prompts, at)

        def make(batch: Batch) -> GradientRecorder:
            in_batch = change.for_batch(batch, range(model.n_layers))
            factors = None if self.factors is None else batch.everywhere(self.factors[batch.rows])
            return GradientRecorder(batch, batch.cut(at), in_batch, factors)

        return make

    def settings(self) -> dict[str, Any]:
        positions = named(self.positions)
        return {"positions": positions, **self.to.describe(), "estimate": "gradient"}


class GradientRecorder(Recorder):
    """Records the margin's gradient at every head's output times the change of that output.

    Parameters
    ----------
    batch
        The batch.
    at
        (B, T) boolean: positions at which heads are changed.
    change
        New outputs of the heads.
    factors
        (B, label) weights of the log-probabilities of answers of several tokens, whose sum
        takes the margin's place; None for the margin.
    """

    group = "effects"

    def __init__(
        self, batch: Batch, at: Everywhere, change: BatchChange, factors: Everywhere | None
    ) -> None:
        self.factors = factors
        self.gold, self.answers = batch.gold, batch.answers
        self.at, self.change, self.donors = at, change, change.donors
        self.z: dict[int, torch.Tensor] = {}

    def layer(self, view: LayerView) -> None:
        self.z[view.index] = view.z

    def finish(self, end: End) -> dict[str, torch.Tensor]:
        total = self._total(end)
        gradients = torch.autograd.grad(total, list(self.z.values()))
        drops = []
        for (layer, z), gradient in zip(self.z.items(), gradients, strict=True):
            new = self.change.output(layer, z)
            lost = (gradient.float() * (z.float() - new.float())).sum(dim=-1)
            at = self.at.on(z.device).unsqueeze(-1)
            drops.append(lost.masked_fill(~at, 0).sum(dim=1).detach())
        return {"margin_drop": stack_heads(drops, end)}

    def _total(self, end: End) -> Float[torch.Tensor, ""]:
        """Return the sum of the margins of all prompts."""
        if self.factors is not None:
            logprob = answer_logprobs(self.answers, end)
            factors = self.factors.on(logprob.device)
            return (logprob.masked_fill(factors == 0, 0) * factors).sum()
        logits = end.logits.gather(1, self.answers.ids.on(end.logits.device))
        if self.answers.alone:
            logits = logits - end.logits.logsumexp(dim=-1, keepdim=True)
        return margin(logits, self.gold.on(logits.device)).sum()
