"""Mark prompts with non-finite logits as missing in datasets.

In float16 some prompts overflow, and the model's output for them has no meaning. Their values are
missing: NaN in numbers and booleans, "" in texts, -1 in ids.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .forms import describe
from .schema import COORDINATES

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    import xarray as xr

MOST_NAMED = 5
"""Largest number of prompts named in a message; further ones are counted."""

UNDEFINED = ("share", "qk_auc", "ov_auc", "qk_auc_drop", "ov_auc_drop", "class_attention_drop")
"""Variables that may be NaN by definition; NaN there does not mean overflow."""


def finite_prompts(dataset: xr.Dataset | xr.DataTree) -> np.ndarray:
    """Return a (prompt,) boolean mask of the prompts with finite logits."""
    if "finite" not in dataset.coords:
        return np.ones(dataset.sizes["prompt"], dtype=bool)
    return np.asarray(dataset["finite"].values, dtype=bool)


def mark_missing(dataset: xr.Dataset, **there: np.ndarray) -> xr.Dataset:
    """Add coordinates that mark prompts with values; set booleans of other prompts to NaN.

    Parameters
    ----------
    dataset
        Dataset with the dim `prompt`. If a prompt is missing, its booleans become floats.
    **there
        (prompt,) boolean masks by coordinate name, "measured" or "finite". A coordinate that is
        True for all prompts is not added.
    """
    kept = {name: values for name, values in there.items() if not values.all()}
    if not kept:
        return dataset
    dataset = dataset.assign_coords(
        {name: ("prompt", values, describe(COORDINATES[name])) for name, values in kept.items()}
    )
    for key, array in dataset.data_vars.items():
        if array.dtype.kind == "b" and "prompt" in array.dims:
            known = array.astype("float32")
            for name in kept:
                known = known.where(dataset[name])
            dataset[key] = known.assign_attrs(array.attrs)
    return dataset


def blank(values: np.ndarray, finite: np.ndarray) -> np.ndarray:
    """Return values with non-finite prompts set to missing; booleans stay booleans.

    Parameters
    ----------
    values
        (prompt, ...) of any kind.
    finite
        (prompt,) boolean.
    """
    if finite.all():
        return values
    values = values.copy()
    values[~finite] = missing_value(values.dtype)
    return values


def missing_value(dtype: np.dtype) -> float | int | str:
    """Return the missing value of a dtype: NaN, -1, "", or False for booleans."""
    known: dict[str, float | int] = {"f": np.nan, "i": -1, "b": False}
    return known.get(dtype.kind, "")


def count_values(
    variables: Mapping[str, tuple[tuple[str, ...], np.ndarray]],
    finite: np.ndarray,
    absent: Mapping[tuple[str, ...], np.ndarray] | None = None,
) -> int:
    """Count single NaN values, such as overflowed counterfactuals.

    Values at the same place in several variables or labels count once.

    Parameters
    ----------
    variables
        Dims and values, by name.
    finite
        (prompt,) boolean mask; prompts with False do not count.
    absent
        Boolean masks, by their dims, of places that have no value by definition, such as padding
        (prompt, position) and places without a head (layer, head).
    """
    found: dict[tuple[str, ...], np.ndarray] = {}
    for name, (dims, values) in variables.items():
        if values.dtype.kind != "f" or dims[:1] != ("prompt",) or name in UNDEFINED:
            continue
        bad = np.isnan(values)
        if not bad[finite].any():
            continue
        if "label" in dims:
            bad = bad.any(axis=dims.index("label"))
            dims = tuple(dim for dim in dims if dim != "label")
        bad[~finite] = False
        for own, mask in (absent or {}).items():
            if set(own) <= set(dims):
                others = tuple(i for i, dim in enumerate(dims) if dim not in own)
                bad &= ~np.expand_dims(mask, others)
        found[dims] = found.get(dims, np.zeros_like(bad)) | bad
    return int(sum(bad.sum() for bad in found.values()))


def named(prompts: Iterable[int], total: int, words: str = "prompts") -> str:
    """Return the number and names of prompts, such as "2 of 8 prompts (0, 5)"."""
    numbers = sorted(prompts)
    shown = ", ".join(map(str, numbers[:MOST_NAMED]))
    more = f" and {len(numbers) - MOST_NAMED} more" if len(numbers) > MOST_NAMED else ""
    return f"{len(numbers)} of {total} {words} ({shown}{more})"
