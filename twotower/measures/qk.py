"""QK: similarity of the last position's query to every position's key."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ..walk.batch import Batch
from ..walk.everywhere import Everywhere
from ..walk.recorder import Recorder
from ..walk.scores import content_scores
from ..walk.tensors import keep, stack_heads
from ..walk.views import End, LayerView
from .collect import run
from .measure import MakeRecorder, Measure

if TYPE_CHECKING:
    import xarray as xr

    from ..models import Model
    from ..prompts import Prompts
    from ..prompts.positions import Positions


def qk_similarity(model: Model, prompts: Prompts, *, keep: Positions = "all") -> xr.Dataset:
    """Return the similarity of the last position's query to every position's key.

    Parameters
    ----------
    model, prompts
        Model and prompts to measure.
    keep
        Positions to keep: "all", "labels", "last", `twotower.at`, or a boolean (prompt,
        position) array. The coordinate `position` numbers the kept positions from the last
        one; `token_position` gives their positions in the prompt.

    Returns
    -------
    xarray.Dataset
        score, score_content, attention (prompt, layer, head, position). For rotary models also
        score_content_mean: the content part, averaged over the distances to the label
        positions. NaN at padding.

    Raises
    ------
    InputError
        If `keep` selects no position.
    """
    return run(model, prompts, Similarity(keep))


@dataclass(frozen=True, eq=False)
class Similarity(Measure):
    """The measure behind `qk_similarity`, with its settings."""

    group = "qk"

    keep: Positions = "all"

    def prepare(self, model: Model, prompts: Prompts) -> MakeRecorder:
        labels_at = prompts.where("labels")
        return lambda batch: SimilarityRecorder(batch, batch.cut(labels_at))


class SimilarityRecorder(Recorder):
    """Records QK scores of the last position, their content part, and attention."""

    group = "qk"

    def __init__(self, batch: Batch, labels_at: Everywhere) -> None:
        self.batch, self.labels_at = batch, labels_at
        self.found: dict[str, list[torch.Tensor]] = {}

    def layer(self, view: LayerView) -> None:
        hidden, labels_at = ~view.real[:, None], self.labels_at.on(view.z.device)
        parts = {
            "score": view.last.scores,
            "attention": view.last.weights,
            "score_content": content_scores(view, 1)[:, :, 0],
        }
        if view.architecture.rotary:
            parts["score_content_mean"] = content_scores(view, 1, labels_at=labels_at)[:, :, 0]
        for name, values in parts.items():
            kept = keep(values.masked_fill(hidden, torch.nan), self.batch)
            self.found.setdefault(name, []).append(kept)

    def finish(self, end: End) -> dict[str, torch.Tensor]:
        return {name: stack_heads(values, end) for name, values in self.found.items()}
