"""Predictions of the model, with or without edits of heads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..edits.edits import Edit
from .collect import run
from .predictions import Predictions

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
        Active edits: `KnockOut`, `ScaleAttention`, `DropPosition`, `Patch`, `Add`, `CutEdges`.
        They can be combined. On one head, attention is edited first, then values, then the output.

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
