"""Residual streams at chosen positions, to compare positions by hand."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ..walk.batch import Batch
from ..walk.tensors import keep as kept
from ..walk.tensors import stack
from ..walk.walk import End, LayerView, Recorder
from .collect import run
from .measure import MakeRecorder, Measure

if TYPE_CHECKING:
    import xarray as xr

    from ..models import Model
    from ..prompts import Prompts
    from ..prompts.positions import Positions


def residual_streams(model: Model, prompts: Prompts, *, keep: Positions = "labels") -> xr.Dataset:
    """Return the residual stream entering every layer, at chosen positions.

    Parameters
    ----------
    model, prompts
        What is measured.
    keep
        "labels", "last", "all", `twotower.at`, or a boolean (prompt, position) array. All
        positions of a large model are many numbers: n_layers times d_model for each.

    Returns
    -------
    xarray.Dataset
        residual (prompt, layer, position, feature), float32: x_p^l of Yu & Ananiadou
        (2024). Positions kept are counted from the last of them, and `token_position` says
        where each is; NaN where a prompt has fewer.

    Raises
    ------
    InputError
        If `keep` names no position.
    """
    return run(model, prompts, ResidualStreams(keep))


@dataclass(frozen=True, eq=False)
class ResidualStreams(Measure):
    """The measure behind `residual_streams`, with its settings."""

    group = "residual"

    keep: Positions = "labels"

    def prepare(self, model: Model, prompts: Prompts) -> MakeRecorder:
        return ResidualRecorder


class ResidualRecorder(Recorder):
    """Records the residual streams entering every layer."""

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
