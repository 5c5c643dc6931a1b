"""Predictions of the model, with or without edits of heads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from ..edits.edits import Edit
from ..walk.batch import Batch
from ..walk.tensors import margin
from ..walk.walk import End, Recorder
from .collect import run
from .measure import MakeRecorder, Measure

if TYPE_CHECKING:
    import xarray as xr

    from ..models import Model
    from ..prompts import Prompts


def predict(model: Model, prompts: Prompts, edits: Edit | Sequence[Edit] = ()) -> xr.Dataset:
    """Return the model's answers at the last position.

    Parameters
    ----------
    model, prompts
        Model and prompts to measure.
    edits
        Active edits: `KnockOut`, `ScaleAttention`, `DropPosition`, `Patch`. They can be
        combined. On one head, attention is edited first, then values, then the output.

    Returns
    -------
    xarray.Dataset
        logit, logprob (prompt, label); margin, correct, top_token, top1_correct (prompt).
        `correct` compares only the labels. `top1_correct` compares the whole vocabulary, like
        the accuracy of Yu & Ananiadou (2024).

    Raises
    ------
    InputError
        If an edit does not fit the model or the prompts, or two edits change the same thing.
    """
    return run(model, prompts, Predictions(), edits=edits)


@dataclass(frozen=True)
class Predictions(Measure):
    """The measure behind `predict`."""

    group = "predictions"

    def prepare(self, model: Model, prompts: Prompts) -> MakeRecorder:
        return lambda batch: PredictionsRecorder(batch, prompts.label_ids)


class PredictionsRecorder(Recorder):
    """Records the model's answers at the last position."""

    group = "predictions"

    def __init__(self, batch: Batch, label_ids: tuple[int, ...]) -> None:
        self.gold = batch.gold
        self.label_ids = batch.everywhere(np.array(label_ids))

    def finish(self, end: End) -> dict[str, torch.Tensor]:
        logits = end.logits
        gold, ids = (x.on(logits.device) for x in (self.gold, self.label_ids))
        labels = logits[:, ids]
        top = logits.argmax(dim=-1)
        return {
            "logit": labels,
            "logprob": labels - logits.logsumexp(dim=-1, keepdim=True),
            "margin": margin(labels, gold),
            "correct": labels.argmax(dim=-1) == gold,
            "top_token": top,
            "top1_correct": top == ids[gold],
        }
