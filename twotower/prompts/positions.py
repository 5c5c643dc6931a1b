"""Select positions of prompts by role, label, class or demonstration."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Bool

from ..checks import is_list, one_of, shown, whole, yes_or_no
from ..errors import InputError
from .segments import PLACES, ROLES

if TYPE_CHECKING:
    from .prompts import Prompts


@dataclass(frozen=True)
class At:
    """Positions that match all given properties; use `twotower.at` to make one.

    Attributes
    ----------
    role, label, demonstration_class
        Accepted values; None for any.
    demonstration
        Accepted demonstration numbers; None for any.
    same_class
        Whether the demonstration has the query's class; None for any.
    """

    role: tuple[str, ...] | None = None
    label: tuple[str, ...] | None = None
    demonstration_class: tuple[str, ...] | None = None
    demonstration: tuple[int, ...] | None = None
    same_class: bool | None = None

    def mask(self, prompts: Prompts) -> np.ndarray:
        """Return a (prompt, position) boolean mask; padding is always False.

        Raises
        ------
        InputError
            If no prompt has a given label, class or demonstration.
        """
        found = np.asarray(prompts.token_id >= 0)
        asked: dict[str, tuple[str | int, ...] | None] = {
            "role": self.role,
            "label_text": self.label,
            "demonstration_class": self.demonstration_class,
            "demonstration": self.demonstration,
        }
        for name, wanted in asked.items():
            if wanted is None:
                continue
            values = getattr(prompts, name)
            if name == "role" and "last" in wanted:
                wanted = (*wanted, "answer")
            for one in wanted:
                known = name == "role" and one in ROLES
                if not known and not (values == one).any():
                    what = name.removesuffix("_text").replace("_", " ")
                    raise InputError(f"no position of the prompts has the {what} {one!r}")
            found = found & np.isin(values, list(wanted))
        if self.same_class is not None:
            same = prompts.demonstration_class == prompts.query_class[:, None]
            inside = prompts.demonstration >= 0
            found = found & inside & (same == self.same_class)
        return found

    def describe(self) -> dict[str, Any]:
        """Return the given properties, for the provenance."""
        given = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in given.items() if value is not None}


Positions = str | At | np.ndarray
"""Ways to select positions: a name, `at`, or a boolean (prompt, position) array."""


def at(
    *,
    role: str | Iterable[str] | None = None,
    label: str | Iterable[str] | None = None,
    demonstration_class: str | Iterable[str] | None = None,
    demonstration: int | Iterable[int] | None = None,
    same_class: bool | None = None,
) -> At:
    """Select positions by role, label, class or demonstration, for edits.

    Parameters
    ----------
    role
        One or more of bos, text, separator, label, query, last, or your own names of spans.
    label
        Text of the demonstration's label. Matches all positions of the demonstration; add
        role="label" to match only the label token.
    demonstration_class
        Class of the demonstration.
    demonstration
        Number of the demonstration, from 0.
    same_class
        True: demonstrations of the query's class; False: of other classes.

    Returns
    -------
    At
        Positions that match all given properties, in every prompt.

    Raises
    ------
    InputError
        If no property is given, or one is not a text or a number.

    Examples
    --------
    >>> at(role="label", label="foo").describe()
    {'role': ('label',), 'label': ('foo',)}
    """
    roles = _texts("role", role)
    if "pad" in (roles or ()):
        raise InputError("padding cannot be selected")
    numbers = None
    if demonstration is not None:
        listed: Any = demonstration if is_list(demonstration) else [demonstration]
        numbers = tuple(whole("demonstration", number) for number in listed)
        if not numbers:
            raise InputError("demonstration=[] names no demonstration")
    if same_class is not None:
        yes_or_no("same_class", same_class)
    found = At(
        roles,
        _texts("label", label),
        _texts("demonstration_class", demonstration_class),
        numbers,
        None if same_class is None else bool(same_class),
    )
    if not found.describe():
        raise InputError("at() needs a property to select positions, such as role='label'")
    return found


def _texts(name: str, given: Any) -> tuple[str, ...] | None:
    if given is None:
        return None
    listed = [given] if isinstance(given, str) else given
    texts = tuple(listed) if is_list(listed) else ()
    if not texts or not all(isinstance(text, str) for text in texts):
        raise InputError(f"{name}={shown(given)} must be a text, or several")
    return texts


def position_mask(
    prompts: Prompts, positions: Positions, name: str = "positions"
) -> Bool[np.ndarray, "prompt position"]:
    """Return a (prompt, position) boolean mask from a name, `twotower.at`, or a user's array.

    Parameters
    ----------
    prompts, positions
        The prompts, and what of them is meant.
    name
        Name of the argument, for messages.

    Raises
    ------
    InputError
        If the name is unknown, or the array is not boolean of that shape.
    """
    if isinstance(positions, str):
        one_of(name, positions, PLACES)
        return prompts.where(positions)
    if isinstance(positions, At):
        return positions.mask(prompts)
    positions = _in_order(positions, name)
    # Objects of other kinds fail below; a dataset cannot even become an array.
    mask = np.asarray(None if hasattr(positions, "data_vars") else positions)
    # Imported here: `at` needs no tokens.
    from .sequences import base_of, widened

    if mask.dtype == bool and mask.shape == base_of(prompts).token_id.shape:
        mask = widened(mask, prompts)
    if mask.dtype != bool or mask.shape != prompts.token_id.shape:
        found = f"{mask.dtype} of shape {mask.shape}" if mask.ndim else shown(positions)
        raise InputError(
            f"{name} must be 'last', 'labels', 'all', at(...) or a boolean array of shape "
            f"{prompts.token_id.shape}; this is {found}"
        )
    return mask & (prompts.token_id >= 0)


def _in_order(positions: Any, name: str) -> Any:
    """Return positions in the order of the prompts, if they are an array with named positions."""
    if not hasattr(positions, "coords") or hasattr(positions, "data_vars"):
        return positions
    if {*positions.dims} != {"prompt", "position"}:
        raise InputError(
            f"{name} has the dims {', '.join(positions.dims)}; it needs prompt, position"
        )
    for dim, n in positions.sizes.items():
        if dim in positions.coords:
            positions = positions.sortby(dim)
            # Prompts count from 0, and positions of results up to the last, which is 0.
            if not np.array_equal(positions[dim], np.arange(n) - (n - 1) * (dim == "position")):
                raise InputError(f"{name} is not of all values of {dim!r}, each once")
    return positions.transpose("prompt", "position")


def named(positions: Positions) -> Any:
    """Describe positions, for the provenance."""
    if isinstance(positions, str):
        return positions
    return positions.describe() if hasattr(positions, "describe") else "given"
