"""Alignment of a prompt's positions with its donor's, by role and number of demonstration."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Bool, Int

from ..errors import InputError

if TYPE_CHECKING:
    from ..prompts import Prompts

Key = tuple[str, int]
"""Role and number of demonstration; positions of two prompts match if these are equal."""


def check_donors(prompts: Prompts, donors: Prompts) -> None:
    """Check that there is one donor for each prompt."""
    if len(donors) != len(prompts):
        raise InputError(
            f"there are {len(donors)} donors for {len(prompts)} prompts; give one for each"
        )


def position_keys(prompts: Prompts) -> list[list[Key]]:
    """Return the key of every position, by prompt.

    The tokens of an answer, which predict its further tokens, have the key of the last position.
    """
    roles = np.where(prompts.role == "answer", "last", prompts.role)
    return [
        list(zip(own, numbers, strict=True))
        for own, numbers in zip(roles.tolist(), prompts.demonstration.tolist(), strict=True)
    ]


def donor_columns(
    prompts: Prompts,
    at: Bool[np.ndarray, "prompt position"],
    reference: Prompts,
    donors: Int[np.ndarray, " prompt"],
) -> Int[np.ndarray, "prompt position"]:
    """Return (prompt, position) columns of the donors' matching positions, counted from the end.

    Parameters
    ----------
    prompts
        Prompts to measure.
    at
        (prompt, position) boolean: positions that need a match. Others get -1.
    reference
        Prompts from which donors are taken.
    donors
        (prompt,) number of each prompt's donor in `reference`.

    Raises
    ------
    InputError
        If a prompt and its donor do not align at these positions.
    """
    reference_keys = position_keys(reference)
    columns = np.full(at.shape, -1, dtype=np.int64)
    for i, (keys, donor) in enumerate(zip(position_keys(prompts), donors, strict=True)):
        columns[i] = _match(keys, at[i], reference_keys[donor], i, int(donor))
    return columns


def _match(
    keys: list[Key],
    at: Bool[np.ndarray, " position"],
    donor_keys: list[Key],
    prompt: int,
    donor: int,
) -> Int[np.ndarray, " position"]:
    """Return the donor's column, counted from its end, for every position in `at`."""
    places: dict[Key, list[int]] = {}
    for column, key in enumerate(donor_keys):
        places.setdefault(key, []).append(column - len(donor_keys))
    own: dict[Key, list[int]] = {}
    for column, key in enumerate(keys):
        own.setdefault(key, []).append(column)
    columns = np.full(len(keys), -1, dtype=np.int64)
    for key, mine in own.items():
        if not at[mine].any():
            continue
        theirs = places.get(key, [])
        if key[0] == "last" and len(theirs) == 1:
            theirs = theirs * len(mine)
        if len(theirs) != len(mine):
            raise InputError(
                f"prompt {prompt} has {len(mine)} tokens of role {key[0]!r} in demonstration "
                f"{key[1]} and its donor, reference prompt {donor}, has {len(theirs)}: they cannot "
                "be aligned. Use Mean(reference), or positions='last' or 'labels'"
            )
        columns[mine] = theirs
    return columns
