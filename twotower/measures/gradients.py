"""Attribution patching: effects of all heads estimated from one gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import torch

from ..errors import InputError
from .ablation import Values
from .batch import Batch
from .collect import collect, dataset
from .edits import prepare_change
from .effects import change_settings
from .everywhere import Everywhere
from .measure import measure
from .recorders import margin, stack
from .walk import End, LayerView, Recorder

if TYPE_CHECKING:
    import xarray as xr

    from ..intervention import Positions
    from ..models import Model
    from ..prompts import Prompts


class Gradient(Recorder):
    """Margin's gradient at every head's output, times the change of that output.

    Parameters
    ----------
    batch
        The batch.
    label_ids
        Token ids of the labels.
    at
        (B, T) boolean: positions at which heads are changed.
    values
        (B, T, H, D) by layer: what z is replaced by; None to multiply it by `factor`.
    """

    group = "effects"

    def __init__(
        self,
        batch: Batch,
        label_ids: tuple[int, ...],
        at: Everywhere,
        values: Values | None,
        factor: float,
    ) -> None:
        self.gold, self.label_ids = batch.gold, batch.everywhere(np.array(label_ids))
        self.at, self.values, self.factor = at, values, factor
        self.donors = () if values is None else values.donors
        self.z: list[torch.Tensor] = []

    def layer(self, view: LayerView) -> None:
        self.z.append(view.z)

    def finish(self, end: End) -> dict[str, torch.Tensor]:
        logits = end.logits[:, self.label_ids.on(end.logits.device)]
        total = margin(logits, self.gold.on(logits.device)).sum()
        gradients = torch.autograd.grad(total, self.z)
        drops = []
        for layer, (z, gradient) in enumerate(zip(self.z, gradients, strict=True)):
            new = z * self.factor
            if self.values is not None:
                new = self.values.by_layer[layer].to(z.device, z.dtype)
            lost = (gradient.float() * (z.float() - new.float())).sum(dim=-1)
            at = self.at.on(z.device).unsqueeze(-1)
            drops.append(lost.masked_fill(~at, 0).sum(dim=1).detach())
        return {"margin_drop": stack(drops, end)}


@measure
def attribution_patching(
    model: Model,
    prompts: Prompts,
    positions: Positions = "last",
    *,
    ablation: str = "zero",
    reference: Prompts | None = None,
    seed: int = 0,
    factor: float = 0.0,
    batch_size: int | None = None,
    progress: bool | str = False,
) -> xr.Dataset:
    """Effect of changing every head, estimated to first order.

    The margin's gradient at a head's output z, times the change of z: one forward and one
    backward for all heads (and a forward of the donors, where there are any). It is an
    estimate; compare it with the exact sweep by `agreement`.

    Parameters
    ----------
    model, prompts, positions, ablation, reference, seed, factor
        As in `head_effects`.
    batch_size, progress
        As in `head_effects`.

    Returns
    -------
    xarray.Dataset
        margin_drop (prompt, layer, head), as `head_effects` has it, with the attribute
        `estimate`.

    Raises
    ------
    InputError
        As `head_effects`; or if the model is quantized.

    References
    ----------
    Nanda (2023), "Attribution patching: activation patching at industrial scale".
    """
    if model.quantization:
        raise InputError("gradients need a model that is not quantized; use head_effects")
    make = gradient_maker(model, prompts, positions, ablation, reference, seed, factor)
    (arrays,) = collect(
        model,
        prompts,
        [make],
        batch_size=batch_size,
        gradients=True,
        kind=("gradient", ablation),
        progress=progress,
    )
    return dataset(
        "effects",
        arrays,
        model,
        prompts,
        **change_settings(positions, ablation, reference, seed, factor),
        estimate="gradient",
    )


def gradient_maker(
    model: Model,
    prompts: Prompts,
    positions: Positions = "last",
    ablation: str = "zero",
    reference: Prompts | None = None,
    seed: int = 0,
    factor: float = 0.0,
) -> Callable[[Batch], Gradient]:
    """What makes the gradient's recorder for each batch."""
    at, replacement = prepare_change(model, prompts, positions, ablation, reference, seed, factor)

    def make(batch: Batch) -> Gradient:
        values = replacement.values(batch, range(model.n_layers))
        return Gradient(batch, prompts.label_ids, batch.cut(at), values, factor)

    return make
