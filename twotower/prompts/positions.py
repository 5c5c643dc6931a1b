"""Picking positions of prompts by the part they play."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Bool

from ..checks import one_of, whole, yes_or_no
from ..errors import InputError
from .segments import ROLES

if TYPE_CHECKING:
    from .prompts import Prompts


@dataclass(frozen=True)
class At:
    """Positions that have all of some properties; made by `twotower.at`.

    Attributes
    ----------
    role, label, demonstration_class
        Accepted texts; None for any.
    demonstration
        Accepted numbers of demonstrations; None for any.
    same_class
        Whether the demonstration's class is the query's; None for either.
    """

    role: tuple[str, ...] | None = None
    label: tuple[str, ...] | None = None
    demonstration_class: tuple[str, ...] | None = None
    demonstration: tuple[int, ...] | None = None
    same_class: bool | None = None

    def mask(self, prompts: Prompts) -> np.ndarray:
        """(prompt, position) boolean; padding is never meant.

        Raises
        ------
        InputError
            If a label, class or demonstration stands in none of the prompts.
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
            for one in wanted:
                if name != "role" and not (values == one).any():
                    what = name.removesuffix("_text").replace("_", " ")
                    raise InputError(f"no position of the prompts has the {what} {one!r}")
            found = found & np.isin(values, list(wanted))
        if self.same_class is not None:
            same = prompts.demonstration_class == prompts.query_class[:, None]
            inside = prompts.demonstration >= 0
            found = found & inside & (same == self.same_class)
        return found

    def describe(self) -> dict[str, Any]:
        """The properties that are asked for, for the record."""
        given = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in given.items() if value is not None}


Positions = str | At | np.ndarray
"""How users pick positions: by name, by `at`, or as a boolean (prompt, position) array."""


def at(
    *,
    role: str | Iterable[str] | None = None,
    label: str | Iterable[str] | None = None,
    demonstration_class: str | Iterable[str] | None = None,
    demonstration: int | Iterable[int] | None = None,
    same_class: bool | None = None,
) -> At:
    """Positions by role, label, class or demonstration, as edits take them.

    Parameters
    ----------
    role
        One or more of bos, text, separator, label, query, last.
    label
        Text of the demonstration's label. All positions of the demonstration have it;
        with role="label" only the label itself is meant.
    demonstration_class
        Class of the demonstration.
    demonstration
        Number of the demonstration, from 0.
    same_class
        True: demonstrations of the query's own class; False: of another.

    Returns
    -------
    At
        Positions that have all the properties given, in every prompt.

    Raises
    ------
    InputError
        If nothing is asked for, or a role is not known.

    Examples
    --------
    >>> at(role="label", label="foo").describe()
    {'role': ('label',), 'label': ('foo',)}
    """
    roles = _texts("role", role)
    for name in roles or ():
        one_of("role", name, ROLES[1:])
    numbers = None
    if demonstration is not None:
        listed = demonstration if isinstance(demonstration, Iterable) else [demonstration]
        numbers = tuple(whole("demonstration", number) for number in listed)
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
        raise InputError("at() needs a property to pick positions by, such as role='label'")
    return found


def _texts(name: str, given: Any) -> tuple[str, ...] | None:
    if given is None:
        return None
    listed = [given] if isinstance(given, str) else given
    ok = isinstance(listed, Iterable)
    texts = tuple(listed) if ok else ()
    if not texts or not all(isinstance(text, str) for text in texts):
        raise InputError(f"{name}={given!r} must be a text, or several")
    return texts


def position_mask(prompts: Prompts, positions: Positions) -> Bool[np.ndarray, "prompt position"]:
    """(prompt, position) boolean, from a name, from `twotower.at`, or from a user's array.

    Raises
    ------
    InputError
        If the name is not known, or the array is not boolean of that shape.
    """
    if isinstance(positions, str):
        return prompts.where(positions)
    if hasattr(positions, "mask") and hasattr(positions, "describe"):
        return positions.mask(prompts)
    mask = np.asarray(positions)
    if mask.dtype != bool or mask.shape != prompts.token_id.shape:
        raise InputError(
            f"positions must be 'last', 'labels', 'all', at(...) or a boolean array of shape "
            f"{prompts.token_id.shape}; this is {mask.dtype} of shape {mask.shape}"
        )
    return mask & (prompts.token_id >= 0)


def named(positions: Positions) -> Any:
    """Positions, for the record."""
    if isinstance(positions, str):
        return positions
    return positions.describe() if hasattr(positions, "describe") else "given"
