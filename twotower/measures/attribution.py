"""Direct attribution: how much each head's own output raises the labels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch

from ..checks import one_of
from ..models.architecture import call
from ..walk.batch import Batch
from ..walk.readout import Readout, dot
from ..walk.readouts import Readouts
from ..walk.recorder import Recorder
from ..walk.tensors import stack_heads
from ..walk.views import End, LayerView
from .collect import run
from .measure import MakeRecorder, Measure

if TYPE_CHECKING:
    import xarray as xr

    from ..models import Model
    from ..prompts import Prompts

Norm = Literal["frozen", "own"]


def attribution(model: Model, prompts: Prompts, norm: Norm = "frozen") -> xr.Dataset:
    """Return how much each head's own output raises the labels at the last position.

    Parameters
    ----------
    model, prompts
        Model and prompts to measure.
    norm
        Statistics of the final norm. "own": those of the vector that is normed. "frozen":
        those of the last position's final residual stream.

    Returns
    -------
    xarray.Dataset
        logprob_increase (prompt, layer, head, label), in nat: log p(label given x + u) -
        log p(label given x), where x is the residual stream entering the layer and u the
        head's output (Yu & Ananiadou 2024). label_logit (prompt, layer, head, label).

    Raises
    ------
    InputError
        If `norm` is unknown.
    """
    return run(model, prompts, Attribution(norm))


@dataclass(frozen=True)
class Attribution(Measure):
    """The measure behind `attribution`, with its settings."""

    group = "attribution"

    norm: Norm = "frozen"

    def __post_init__(self) -> None:
        one_of("norm", self.norm, ("own", "frozen"))

    def prepare(self, model: Model, prompts: Prompts) -> MakeRecorder:
        readouts = Readouts(model, prompts)
        return lambda batch: AttributionRecorder(batch, readouts.of(batch), self.norm)


class AttributionRecorder(Recorder):
    """Records the log-probability increase and the label logit of every head's output.

    Parameters
    ----------
    batch
        The batch.
    readout
        Readout of the labels.
    norm
        "own" or "frozen", as in `attribution`.
    """

    group = "attribution"

    def __init__(self, batch: Batch, readout: Readout, norm: str) -> None:
        self.batch, self.readout, self.norm = batch, readout, norm
        self.base: list[torch.Tensor] = []
        self.outputs: list[torch.Tensor] = []

    def layer(self, view: LayerView) -> None:
        n_heads = view.z.shape[2]
        alone = torch.eye(n_heads, dtype=view.z.dtype, device=view.z.device)[..., None]
        z = view.z[:, -1:] * alone
        projection = view.architecture.projection(view.block)
        nothing = call(projection, torch.zeros_like(z[:1, :1]).flatten(-2))
        # A copy, because a view would keep the whole residual stream in memory.
        factor = self.readout.on(view.z.device).factors[view.index]
        self.base.append(view.residual[:, -1:] * factor)
        output = self.readout.write(view, call(projection, z.flatten(-2)) - nothing)
        self.outputs.append(output * factor)

    def finish(self, end: End) -> dict[str, torch.Tensor]:
        spread = self.readout.spread(end.residual)
        heads, base = stack_heads(self.outputs, end), stack_heads(self.base, end)
        vectors = torch.cat((base[:, :, :1], base[:, :, :1] + heads), dim=2)
        if self.norm == "own":
            normed = end.final_norm(vectors.to(end.residual.dtype))
        else:
            normed = self.readout.frozen_norm(vectors, spread[:, None, None])
        logprobs = self.readout.logprobs(normed, end)
        self.final_logprobs = self.readout.logprobs(end.final_norm(end.residual), end)
        directions = self.readout.on(heads.device).label_directions
        return {
            "logprob_increase": logprobs[:, :, 1:] - logprobs[:, :, :1],
            "label_logit": dot(heads.float(), directions) / spread.view(-1, 1, 1, 1),
        }
