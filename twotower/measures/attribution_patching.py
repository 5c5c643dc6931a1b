"""Attribution patching: effects of all heads estimated from one gradient."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..edits.changes import Change, Zero, check_change
from ..edits.prepared import BatchChange, prepare_change
from ..errors import InputError
from ..prompts.positions import named, position_mask
from ..walk.batch import Batch
from ..walk.everywhere import Everywhere
from ..walk.tensors import margin, stack_heads
from ..walk.walk import End, LayerView, Recorder
from .collect import run
from .measure import MakeRecorder, Measure

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
    return run(model, prompts, GradientEffects(positions, to))


@dataclass(frozen=True, eq=False)
class GradientEffects(Measure):
    """The measure behind `attribution_patching`, with its settings."""

    group = "effects"
    gradients = True

    positions: Positions = "last"
    to: Change = Zero()

    def __post_init__(self) -> None:
        check_change(self.to)

    def prepare(self, model: Model, prompts: Prompts) -> MakeRecorder:
        if model.quantization:
            raise InputError("gradients need a model that is not quantized; use head_effects")
        at = position_mask(prompts, self.positions)
        if not at.any():
            raise InputError("positions are empty: nothing would be changed")
        change = prepare_change(self.to, model, prompts, at)

        def make(batch: Batch) -> GradientRecorder:
            in_batch = change.for_batch(batch, range(model.n_layers))
            return GradientRecorder(batch, prompts.label_ids, batch.cut(at), in_batch)

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
    label_ids
        Token ids of the labels.
    at
        (B, T) boolean: positions at which heads are changed.
    change
        New outputs of the heads.
    """

    group = "effects"

    def __init__(
        self, batch: Batch, label_ids: tuple[int, ...], at: Everywhere, change: BatchChange
    ) -> None:
        self.gold, self.label_ids = batch.gold, batch.everywhere(np.array(label_ids))
        self.at, self.change, self.donors = at, change, change.donors
        self.z: dict[int, torch.Tensor] = {}

    def layer(self, view: LayerView) -> None:
        self.z[view.index] = view.z

    def finish(self, end: End) -> dict[str, torch.Tensor]:
        logits = end.logits[:, self.label_ids.on(end.logits.device)]
        total = margin(logits, self.gold.on(logits.device)).sum()
        gradients = torch.autograd.grad(total, list(self.z.values()))
        drops = []
        for (layer, z), gradient in zip(self.z.items(), gradients, strict=True):
            new = self.change.output(layer, z)
            lost = (gradient.float() * (z.float() - new.float())).sum(dim=-1)
            at = self.at.on(z.device).unsqueeze(-1)
            drops.append(lost.masked_fill(~at, 0).sum(dim=1).detach())
        return {"margin_drop": stack_heads(drops, end)}
