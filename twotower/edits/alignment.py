"""Alignment of a prompt's positions with its donor's, by role and number of demonstration."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Bool, Int

from ..errors import InputError
from ..prompts.sequences import base_of, continued_as, owners

if TYPE_CHECKING:
    from ..models import Model
    from ..prompts import Prompts

Key = tuple[str, int]
"""Role and number of demonstration; positions of two prompts match if these are equal."""


def check_donors(prompts: Prompts, donors: Prompts) -> None:
    """Check that there is one donor for each prompt."""
    if len(donors) != len(prompts):
        raise InputError(
            f"there are {len(donors)} donors for {len(prompts)} prompts; give one for each"
        )


def donors_of_sequences(model: Model, prompts: Prompts, donors: Prompts) -> Prompts:
    """Return a donor for each prompt, or for each sequence with an answer's tokens after it.

    The same tokens follow the donor, so that it gives its output where they are predicted.

    Parameters
    ----------
    model
        The model that runs them.
    prompts
        Prompts to measure, or their sequences.
    donors
        One donor for each prompt.

    Raises
    ------
    InputError
        If their number is wrong, they were made with another tokenizer, or they are too long
        with the answer.
    """
    check_donors(base_of(prompts), donors)
    donors.check_model(model)
    found = continued_as(donors, prompts)
    answer = "" if found is donors else " with its answer"
    if model.max_positions is not None and found.n_positions > model.max_positions:
        raise InputError(
            f"a donor has {found.n_positions} tokens{answer} and the model takes "
            f"{model.max_positions}; use shorter donors"
        )
    return found


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
    donors: Prompts,
) -> Int[np.ndarray, "prompt position"]:
    """Return (prompt, position) columns of the donors' matching positions, counted from the end.

    Parameters
    ----------
    prompts
        Prompts to measure.
    at
        (prompt, position) boolean: positions that need a match. Others get -1.
    donors
        One donor for each prompt.

    Raises
    ------
    InputError
        If a prompt and its donor do not align at these positions.
    """
    columns = np.full(at.shape, -1, dtype=np.int64)
    keys = zip(position_keys(prompts), position_keys(donors), owners(prompts), strict=True)
    for i, (own, theirs, prompt) in enumerate(keys):
        columns[i] = _match(own, at[i], theirs, prompt)
    return columns


def _match(
    keys: list[Key],
    at: Bool[np.ndarray, " position"],
    donor_keys: list[Key],
    prompt: int,
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
        if len(theirs) != len(mine):
            raise InputError(
                f"prompt {prompt} has {len(mine)} tokens of role {key[0]!r} in demonstration "
                f"{key[1]} and its donor has {len(theirs)}: they cannot be aligned. Use "
                "Mean(reference), or positions='last' or 'labels'"
            )
        columns[mine] = theirs
    return columns
