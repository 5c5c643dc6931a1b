"""Check that groups of results were measured on one model and on the same prompts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from ..errors import InputError

if TYPE_CHECKING:
    import xarray as xr

SAME = {
    "model": "model",
    "weights_hash": "weights",
    "adapters": "adapters",
    "prompts_hash": "prompts",
}
"""Attributes in which groups that are combined must agree, and what they tell."""


def alike(parts: Mapping[str, xr.Dataset]) -> list[xr.Dataset]:
    """Return groups with the layers and heads of the first one, in its order.

    Parameters
    ----------
    parts
        Groups by name.

    Raises
    ------
    InputError
        If they were measured on different weights, adapters or prompts, or have other heads.
    """
    (first, one), *rest = parts.items()
    found = [one]
    for name, part in rest:
        for attribute, what in SAME.items():
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
        for dim in ("layer", "head"):
            if not np.array_equal(np.sort(one[dim].values), np.sort(part[dim].values)):
                raise InputError(f"{first} and {name} have other values of {dim!r}")
        found.append(part.sel(layer=one["layer"].values, head=one["head"].values))
    return found
