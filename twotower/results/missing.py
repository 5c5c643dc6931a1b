"""Prompts whose logits are not finite: marked in datasets, so that they count for nothing.

In float16 some prompts overflow. What a model says of them means nothing, so their values are
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
"""Prompts that a message names; of the others it gives the number."""

UNDEFINED = ("share",)
"""Variables that are NaN by definition in some prompts, so that NaN there is no overflow."""


def finite_prompts(dataset: xr.Dataset | xr.DataTree) -> np.ndarray:
    """(prompt,) boolean: which prompts of a dataset have finite logits."""
    if "finite" not in dataset.coords:
        return np.ones(dataset.sizes["prompt"], dtype=bool)
    return np.asarray(dataset["finite"].values, dtype=bool)


def mark_missing(dataset: xr.Dataset, **there: np.ndarray) -> xr.Dataset:
    """Say in coordinates which prompts have values, and make booleans NaN in the others.

    Parameters
    ----------
    dataset
        With the dim `prompt`. Its booleans become floats where a prompt is missing.
    **there
        (prompt,) boolean by name of the coordinate, "measured" or "finite". A coordinate that
        would be True for all prompts is left out.
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
    """Values (prompt, ...), missing where a prompt is not finite; booleans stay booleans.

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
    """What stands for a missing value: NaN, -1, "", and False for want of better."""
    known: dict[str, float | int] = {"f": np.nan, "i": -1, "b": False}
    return known.get(dtype.kind, "")


def count_values(
    variables: Mapping[str, tuple[tuple[str, ...], np.ndarray]],
    finite: np.ndarray,
    padded: np.ndarray | None = None,
) -> int:
    """Number of single values that are NaN, such as counterfactuals that overflowed.

    A value that has several variables or labels, of which any is NaN, counts once.

    Parameters
    ----------
    variables
        By name: dims and values.
    finite
        (prompt,) boolean; the other prompts do not count.
    padded
        (prompt, position) boolean: where there is nothing to measure.
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
        if "position" in dims and padded is not None:
            bad &= ~np.expand_dims(
                padded,
                tuple(i for i, dim in enumerate(dims) if dim not in ("prompt", "position")),
            )
        found[dims] = found.get(dims, np.zeros_like(bad)) | bad
    return int(sum(bad.sum() for bad in found.values()))


def named(prompts: Iterable[int], total: int, words: str = "prompts") -> str:
    """How many prompts of how many, and which, such as "2 of 8 prompts (0, 5)"."""
    numbers = sorted(prompts)
    shown = ", ".join(map(str, numbers[:MOST_NAMED]))
    more = f" and {len(numbers) - MOST_NAMED} more" if len(numbers) > MOST_NAMED else ""
    return f"{len(numbers)} of {total} {words} ({shown}{more})"
