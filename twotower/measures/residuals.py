"""Residual streams as they are, for comparing positions by hand."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from .batch import Batch
from .collect import collect, dataset
from .measure import measure
from .recorders import keep as kept
from .recorders import stack
from .walk import End, LayerView, Recorder

if TYPE_CHECKING:
    import xarray as xr

    from ..intervention import Positions
    from ..models import Model
    from ..prompts import Prompts


class Residuals(Recorder):
    """Residual streams entering every layer."""

    group = "residual"

    def __init__(self, batch: Batch) -> None:
        self.batch = batch
        self.found: list[torch.Tensor] = []

    def layer(self, view: LayerView) -> None:
        # A float32 copy: a later layer of the model may write into its stream in place.
        padded = ~view.real[..., None]
        stream = view.residual.float().masked_fill(padded, torch.nan)
        self.found.append(kept(stream.transpose(1, 2), self.batch).transpose(1, 2))

    def finish(self, end: End) -> dict[str, torch.Tensor]:
        return {"residual": stack(self.found, end)}


@measure
def residual_streams(
    model: Model,
    prompts: Prompts,
    *,
    keep: Positions = "labels",
    batch_size: int | None = None,
    progress: bool | str = False,
) -> xr.Dataset:
    """The residual stream entering every layer, at chosen positions.

    Parameters
    ----------
    model, prompts
        What is measured.
    keep
        "labels", "last", "all", `twotower.at`, or a boolean (prompt, position) array. All
        positions of a large model are many numbers: n_layers times d_model for each.
    batch_size
        Prompts in a batch; by default as many as make about a thousand tokens.
    progress
        Show a bar; a text is its title.

    Returns
    -------
    xarray.Dataset
        residual (prompt, layer, position, feature), float32: x_p^l of Yu & Ananiadou
        (2024). Positions kept are counted from the last of them, and `token_position` says
        where each is; NaN where a prompt has fewer.

    Raises
    ------
    InputError
        If no position is meant.
    """
    (arrays,) = collect(
        model, prompts, [Residuals], batch_size=batch_size, keep=keep, progress=progress
    )
    return dataset("residual", arrays, model, prompts, keep=keep)
