"""Causal tracing of heads: how much each head's clean output restores in a corrupted run."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..checks import check_is
from ..edits.alignment import check_donors
from ..edits.changes import From
from ..errors import InputError
from ..prompts.positions import named
from ..results.missing import blank
from ..walk.not_finite import FINITE
from .collect import collect
from .datasets import dataset
from .effects import Effects
from .measurement import measurement
from .predictions import Predictions

if TYPE_CHECKING:
    import xarray as xr

    from ..models import Model
    from ..prompts import Prompts
    from ..prompts.positions import Positions


@measurement
def causal_tracing(
    model: Model,
    prompts: Prompts,
    corrupted: Prompts,
    positions: Positions = "last",
) -> xr.Dataset:
    """Return how much of the clean answer each head's clean output restores in corrupted prompts.

    Puts a clean prompt's head outputs into its corrupted prompt, one head at a time, and reads
    the margin of the *clean* prompt's answer. One walk sweeps all heads, as in `head_effects`.
    Also called activation patching (denoising).

    Parameters
    ----------
    model
        The model.
    prompts
        Clean prompts.
    corrupted
        One corrupted prompt for each clean one, in the same order, such as
        `prompts.reversed_labels()` or `prompts.other_queries()`.
    positions
        Positions at which outputs are replaced, as in `head_effects`. Except at "last", clean
        and corrupted prompts must align there token by token.

    Returns
    -------
    xarray.Dataset
        margin_gain (prompt, layer, head): margin with the head's clean output minus that of
        the corrupted run. margin_clean, margin_corrupted (prompt): their difference is the
        gain of a full restoration. A prompt is missing (NaN) if its logits or those of its
        corrupted prompt are not finite.

    Raises
    ------
    InputError
        If clean and corrupted prompts differ in labels or number, or cannot be aligned.
    """
    check_is(corrupted, "Prompts", "corrupted")
    corrupted.check_model(model)
    if corrupted.labels != prompts.labels:
        raise InputError(
            f"the corrupted prompts have labels {corrupted.labels}, the clean ones {prompts.labels}"
        )

    check_donors(corrupted, prompts)
    asked = corrupted.asked_like(prompts)
    measures = [Effects(positions, From(prompts), logprobs=False), Predictions()]
    traced, own = collect(model, asked, measures)
    (clean,) = collect(model, prompts, [Predictions()])
    arrays = {
        "margin_gain": -traced["margin_drop"],
        "margin_clean": clean["margin"],
        "margin_corrupted": own["margin"],
        FINITE: traced[FINITE] & clean[FINITE],
    }
    arrays = {name: blank(values, arrays[FINITE]) for name, values in arrays.items()}
    settings = {"positions": named(positions), "corrupted": corrupted.hash}
    return dataset("tracing", arrays, model, prompts, settings)
