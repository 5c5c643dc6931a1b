"""Base classes of recorders, which keep tensors for a measure, and of edits, which change heads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float

from .batch import Batch
from .views import End, LayerView, PassingView


class Recorder:
    """Records the tensors that a measure needs from a walk; one recorder for each batch."""

    group: str = ""
    """Group of the schema that names the results."""

    readout: Any = None
    """Readout of the labels, if the recorder uses one; the proof checks it."""

    final_logprobs: torch.Tensor | None = None
    """(B, label) log-probabilities of the clean run, if the recorder computes them."""

    claims: Sequence[Any] = ()
    """The recorder's own claims about the batch (`twotower.walk.proof`)."""

    donors: Sequence[Donors] = ()
    """Donors to run before the batch."""

    shares_rows: bool = False
    """Whether values that are not finite in one prompt may reach other prompts."""

    def layer(self, view: LayerView) -> None:
        """Record a layer; called for every layer with heads, in order."""

    def passing(self, view: PassingView) -> None:
        """Record a layer without heads; called for every such layer, in order."""

    def finish(self, end: End) -> dict[str, torch.Tensor]:
        """Return the batch's results; called after the last layer."""
        return {}


class Together(Recorder):
    """Several recorders whose results belong to one group."""

    def __init__(self, recorders: Sequence[Recorder]) -> None:
        self.recorders = recorders
        self.group = recorders[0].group
        self.readout = recorders[0].readout

    def layer(self, view: LayerView) -> None:
        for recorder in self.recorders:
            recorder.layer(view)

    def passing(self, view: PassingView) -> None:
        for recorder in self.recorders:
            recorder.passing(view)

    def finish(self, end: End) -> dict[str, torch.Tensor]:
        return {k: x for recorder in self.recorders for k, x in recorder.finish(end).items()}


@dataclass
class Donors:
    """Prompts that run before a batch and whose activations are put into it.

    Attributes
    ----------
    batch
        Batch of the donor prompts.
    recorder
        Recorder of the activations. The edit that uses them reads them from the recorder.
    """

    batch: Batch
    recorder: Recorder


class BatchEdit:
    """An edit prepared for a batch."""

    donors: Sequence[Donors] = ()
    """Donors to run before the batch."""

    def apply(
        self, view: LayerView, z: Float[torch.Tensor, "B T H D"]
    ) -> Float[torch.Tensor, "B T H D"]:
        """Return the edited z of a layer, or z itself if the layer is not edited."""
        return z

    def enter(
        self, layer: int, residual: Float[torch.Tensor, "B S d_model"], last: bool = False
    ) -> Float[torch.Tensor, "B S d_model"]:
        """Return the edited residual stream entering a layer, or itself if it is not edited.

        After the last layer, it is called with the number of layers. With `last`, the stream is
        that of one position after the prompt's last.
        """
        return residual

    def leave(self, view: LayerView | PassingView) -> None:
        """Keep what is needed of a layer, after all edits of it."""
