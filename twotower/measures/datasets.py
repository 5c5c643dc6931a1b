"""Datasets of measures: coordinates, provenance and missing values."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from ..checks import one_of
from ..errors import InputError
from ..prompts.pieces import token_texts
from ..prompts.positions import position_mask
from ..results import GROUPS, make_dataset, provenance
from ..results.missing import count_values, mark_missing
from ..walk.batch import columns_of
from ..walk.not_finite import FINITE, note_values

if TYPE_CHECKING:
    import xarray as xr

    from ..models import Model
    from ..prompts import Prompts
    from ..prompts.positions import Positions
    from .measure import Measure

Arrays = dict[str, np.ndarray]


def measured_dataset(
    measure: Measure, arrays: Arrays, model: Model, prompts: Prompts, **more: Any
) -> xr.Dataset:
    """Return a measure's dataset, made from its arrays; `more` adds recorded settings."""
    return dataset(
        measure.group,
        arrays,
        model,
        prompts,
        {**measure.settings(), **more},
        keep=measure.keep,
        coordinates=measure.coordinates(),
    )


def dataset(
    group: str,
    arrays: Arrays,
    model: Model,
    prompts: Prompts,
    settings: Mapping[str, Any],
    *,
    keep: Positions = "all",
    coordinates: Mapping[str, Any] | None = None,
    absent: Mapping[tuple[str, ...], np.ndarray] | None = None,
) -> xr.Dataset:
    """Return a group's dataset from its arrays, with coordinates and provenance.

    Parameters
    ----------
    group
        Name of the group.
    arrays
        Arrays by variable. Token ids of "top_token" are converted to text. "finite" (prompt,)
        marks the prompts that are not missing, as returned by `collect`; by default all.
    model, prompts
        Model and prompts that were measured.
    settings
        Settings of the measure to record.
    keep
        Positions that the arrays contain.
    coordinates
        Additional index coordinates.
    absent
        Boolean masks, by their dims, of places that have no value by definition.
    """
    variables = GROUPS[group]
    arrays = dict(arrays)
    finite = arrays.pop(FINITE, np.ones(len(prompts), dtype=bool))
    dims = {dim for name in arrays for dim in variables[name].dims}
    coords: dict[str, Any] = {
        "prompt": np.arange(len(prompts)),
        "gold": prompts.gold,
        "query_class": prompts.query_class,
    }
    if "layer" in dims:
        coords["layer"] = np.arange(model.n_layers)
    if "head" in dims:
        coords["head"] = np.arange(model.n_heads)
    if "feature" in dims:
        coords["feature"] = np.arange(model.d_model)
    if "label" in dims:
        coords["label"] = np.array(prompts.labels, dtype=object)
        coords |= _answers(prompts, model)
    by_position = {
        name: getattr(prompts, name)
        for name in ("role", "demonstration", "demonstration_class", "label_text")
    }
    columns = np.arange(prompts.n_positions)
    kept = kept_columns(prompts, keep)
    if kept is not None:
        columns = np.arange(kept.shape[1])
        fills: dict[str, str | int] = {"role": "pad", "demonstration": -1}
        for name, array in by_position.items():
            fill = fills.get(name, "")
            taken = np.take_along_axis(array, np.maximum(kept, 0), axis=1)
            by_position[name] = np.where(kept < 0, fill, taken)
        by_position["token_position"] = kept - prompts.n_positions + 1
    coords |= {"position": columns - len(columns) + 1, **by_position, **(coordinates or {})}
    texts = {
        name: _texts(array, model) if name == "top_token" else array
        for name, array in arrays.items()
    }
    about = provenance(model, prompts, **settings)
    described = {name: (variables[name].dims, array) for name, array in arrays.items()}
    heads_in = np.array([model.heads_in(layer) for layer in range(model.n_layers)])
    no_head = np.arange(model.n_heads) >= heads_in[:, None]
    masks: dict[tuple[str, ...], np.ndarray] = {
        ("prompt", "position"): by_position["role"] == "pad",
        ("layer", "head"): no_head,
    }
    if "token_number" in coords:
        masks["prompt", "token"] = coords["token_number"] < 0
    values = count_values(described, finite, {**masks, **(absent or {})})
    note_values(group, values)
    if no_head.any():
        about["layers_without_heads"] = json.dumps(model.layers_without_heads)
    about |= {"not_finite": int((~finite).sum()), "not_finite_values": values}
    return mark_missing(make_dataset(group, texts, coords, about), finite=finite)


def _answers(prompts: Prompts, model: Model) -> dict[str, np.ndarray]:
    """Return coordinates of answers that differ by prompt, or have several tokens."""
    answers, found = prompts.answers, {}
    if answers.by_prompt:
        found["answer_text"] = answers.text
        found["answer_token"] = _texts(answers.first, model)
    if answers.token_id.shape[2] > 1:
        found["answer_tokens"] = answers.n_tokens
    return found


def _texts(ids: np.ndarray, model: Model) -> np.ndarray:
    """Return the tokens' texts, and "" for a negative id (no token)."""
    return np.array(token_texts(model.tokenizer, ids.ravel()), dtype=object).reshape(ids.shape)


def kept_columns(prompts: Prompts, keep: Positions) -> np.ndarray | None:
    """Return (prompt, K) columns of the kept positions (see `columns_of`), or None for all.

    Raises
    ------
    InputError
        If the name is unknown, or no position is selected.
    """
    if isinstance(keep, str):
        one_of("keep", keep, ("all", "labels", "last"))
    if isinstance(keep, str) and keep == "all":
        return None
    columns = columns_of(position_mask(prompts, keep, "keep"))
    if not columns.size:
        raise InputError("keep selects no position: nothing would be kept")
    return columns
