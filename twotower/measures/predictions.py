"""The model's answers, as it is or with heads edited."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..intervention import Edit, as_edits
from .collect import collect, dataset
from .measure import measure
from .recorders import Predictions

if TYPE_CHECKING:
    import xarray as xr

    from ..models import Model
    from ..prompts import Prompts


@measure
def predict(
    model: Model,
    prompts: Prompts,
    edits: Edit | Sequence[Edit] = (),
    *,
    batch_size: int | None = None,
    progress: bool | str = False,
) -> xr.Dataset:
    """What the model answers at the last position.

    Parameters
    ----------
    model, prompts
        What is measured.
    edits
        Edits in force: `KnockOut`, `Scale`, `ScaleAttention`, `DropPosition`, `Patch`. They
        can be combined: on one head attention is edited first, then values, then z.
    batch_size
        Prompts in a batch; fewer where memory runs out. By default about a thousand
        tokens' worth on a processor, and as many as fill a GPU, which is found out and
        remembered.
    progress
        Show a bar; a text is its title.

    Returns
    -------
    xarray.Dataset
        logit, logprob (prompt, label); margin, correct, top_token, top1_correct (prompt).
        `correct` compares the labels alone; `top1_correct` the whole vocabulary, which is
        the accuracy of Yu & Ananiadou (2024).

    Raises
    ------
    InputError
        If an edit does not fit the model or the prompts, or two edit the same thing.
    """
    edits = as_edits(edits)
    (arrays,) = collect(
        model,
        prompts,
        [lambda batch: Predictions(batch, prompts.label_ids)],
        batch_size=batch_size,
        edits=edits,
        kind="predictions",
        progress=progress,
    )
    return dataset("predictions", arrays, model, prompts, edits=[e.describe() for e in edits])
