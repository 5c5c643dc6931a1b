"""Residual streams at chosen positions, for your own comparisons."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ..walk.batch import Batch
from ..walk.recorder import Recorder
from ..walk.tensors import keep as kept
from ..walk.tensors import stack
from ..walk.views import End, LayerView, PassingView
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
        Model and prompts to measure.
    keep
        "labels", "last", "all", `twotower.at`, or a boolean (prompt, position) array. Each
        position takes n_layers times d_model numbers, so "all" is large for a large model.

    Returns
    -------
    xarray.Dataset
        residual (prompt, layer, position, feature), float32: x_p^l of Yu & Ananiadou
        (2024). The coordinate `position` numbers the kept positions from the last one;
        `token_position` gives their positions in the prompt. NaN where a prompt has fewer.

    Raises
    ------
    InputError
        If `keep` selects no position.
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
        self._record(view.residual, view.mask.on(view.residual.device))

    def passing(self, view: PassingView) -> None:
        self._record(view.residual, view.mask.on(view.residual.device))

    def _record(self, residual: torch.Tensor, real: torch.Tensor) -> None:
        # A float32 copy, because a later layer may change the residual stream in place.
        stream = residual.float().masked_fill(~real[..., None], torch.nan)
        self.found.append(kept(stream.transpose(1, 2), self.batch).transpose(1, 2))

    def finish(self, end: End) -> dict[str, torch.Tensor]:
        return {"residual": stack(self.found, end)}
