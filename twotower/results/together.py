"""Check that groups of results were measured on one model and on the same prompts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from ..errors import InputError

if TYPE_CHECKING:
    import xarray as xr

SAME = {
    "model": "models",
    "weights_hash": "weights",
    "adapters": "adapters",
    "prompts_hash": "prompts",
}
"""Attributes in which groups that are combined must agree, and what they tell."""


def alike(
    parts: Mapping[str, xr.Dataset], attributes: Mapping[str, str] = SAME
) -> list[xr.Dataset]:
    """Return groups with the prompts, layers and heads of the first one, in its order.

    Parameters
    ----------
    parts
        Groups by name.
    attributes
        Attributes in which they must agree, and what these tell.

    Raises
    ------
    InputError
        If they differ in an attribute, or have other prompts or heads.
    """
    (first, one), *rest = parts.items()
    found = [one]
    for name, part in rest:
        for attribute, what in attributes.items():
            values = {x.attrs.get(attribute, "") for x in (one, part)} - {""}
            if len(values) > 1:
                raise InputError(
                    f"{first} and {name} were measured on different {what}; measure both again"
                )
        if part.sizes.get("prompt") != one.sizes.get("prompt"):
            raise InputError(
                f"{first} has {one.sizes.get('prompt')} prompts and {name} "
                f"{part.sizes.get('prompt')}; select the same prompts of both"
            )
        for dim in ("prompt", "layer", "head"):
            if dim in one.dims and dim in part.dims:
                part = _in_order(part, one, dim, (first, name))
        found.append(part)
    return found


def _in_order(part: xr.Dataset, one: xr.Dataset, dim: str, names: tuple[str, str]) -> xr.Dataset:
    """Return a group whose values of a dim are those of another one, in its order."""
    wanted, given = (x[dim].values for x in (one, part))
    if np.array_equal(wanted, given):  # also if prompts are repeated, as in a bootstrap
        return part
    if not np.array_equal(np.sort(wanted), np.sort(given)) or len(set(given)) < len(given):
        raise InputError(f"{names[0]} and {names[1]} have other values of {dim!r}")
    return part.sel({dim: wanted})
