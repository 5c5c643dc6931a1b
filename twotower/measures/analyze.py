"""Several measures of one set of prompts, from one forward per batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..checks import is_list
from ..errors import InputError
from ..results import make_tree, provenance
from .attribution import Attribution, Norm
from .collect import collect
from .datasets import Arrays, dataset, measured_dataset
from .effects import Effects
from .measure import Measure
from .measurement import measurement
from .ov import LabelValues
from .predictions import Predictions
from .qk import Similarity
from .scores import two_tower_scores

if TYPE_CHECKING:
    import xarray as xr

    from ..models import Model
    from ..prompts import Prompts
    from ..prompts.positions import Positions

MEASURES = ("predictions", "effects", "attribution", "qk", "ov")
"""Names of the measures that `analyze` takes."""


@measurement
def analyze(
    model: Model,
    prompts: Prompts,
    *,
    measures: Sequence[str | Measure] = MEASURES,
    norm: Norm = "frozen",
    logprobs: bool = True,
    keep: Positions = "all",
) -> xr.DataTree:
    """Measure predictions, effects at the last position, attribution, QK and OV of every head.

    Parameters
    ----------
    model, prompts
        Model and prompts to measure.
    measures
        Some of "predictions", "effects", "attribution", "qk", "ov", and your own measures
        (`twotower.measures.measure.Measure`). Each must have a group of its own.
    norm
        Statistics of the final norm, as in `attribution`.
    logprobs
        Whether effects include drops of log-probabilities, as in `head_effects`.
    keep
        Positions at which to keep QK and OV results, as in `qk_similarity`.

    Returns
    -------
    xarray.DataTree
        A run: one group for each measure, `prompts`, and `scores` if QK and OV were measured.

    Raises
    ------
    InputError
        If a measure is unknown, or two have the same group.
    """
    chosen = choose_measures(measures, norm=norm, logprobs=logprobs, keep=keep)
    found = collect(model, prompts, chosen)
    groups, about = run_datasets(model, prompts, chosen, found)
    run = make_tree(groups, about)
    if {"qk", "ov"} <= set(groups) and not prompts.answers.by_prompt:
        groups["scores"] = two_tower_scores(run)
        run = make_tree(groups, about)
    return run


def choose_measures(
    measures: Sequence[str | Measure] = MEASURES,
    *,
    norm: Norm = "frozen",
    logprobs: bool = True,
    keep: Positions = "all",
) -> list[Measure]:
    """Return the measures that `analyze` runs for these arguments.

    Raises
    ------
    InputError
        If a measure is unknown, or two have the same group.
    """
    measures = list(measures) if is_list(measures) else []
    if not measures or not all(map(_is_measure, measures)):
        raise InputError(
            f"measures={measures!r}: choose a list from {', '.join(MEASURES)}, or give "
            "instances of Measure"
        )
    known: dict[str, Measure] = {
        "predictions": Predictions(),
        "effects": Effects(logprobs=logprobs),
        "attribution": Attribution(norm),
        "qk": Similarity(keep),
        "ov": LabelValues(keep=keep),
    }
    found: list[Measure] = []
    for item in dict.fromkeys(measures):
        if not isinstance(item, Measure):
            item = known[item]
        if item.group in (other.group for other in found):
            raise InputError(f"two measures have the group {item.group!r}; measure them apart")
        found.append(item)
    return found


def run_datasets(
    model: Model, prompts: Prompts, measures: Sequence[Measure], found: Sequence[Arrays]
) -> tuple[dict[str, xr.Dataset], dict[str, Any]]:
    """Return a run's groups, made from its measures' arrays, and the attributes of its root."""
    groups = {
        measure.group: measured_dataset(measure, arrays, model, prompts)
        for measure, arrays in zip(measures, found, strict=True)
    }
    missing = max(group.attrs["not_finite"] for group in groups.values())
    texts = prompts_dataset(model, prompts).assign_attrs(not_finite=missing)
    about: Mapping[str, Any] = provenance(model, prompts, measures=list(groups))
    return {"prompts": texts, **groups}, {**about, "not_finite": missing}


def prompts_dataset(model: Model, prompts: Prompts) -> xr.Dataset:
    """Return the dataset of the prompts: texts, tokens and token ids."""
    arrays = {
        "token_id": prompts.token_id,
        "token": prompts.token,
        "text": np.array([p.text for p in prompts], dtype=object),
    }
    return dataset("prompts", arrays, model, prompts, {})


def _is_measure(given: Any) -> bool:
    return isinstance(given, Measure) or (isinstance(given, str) and given in MEASURES)
