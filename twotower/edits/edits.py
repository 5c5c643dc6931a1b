"""Edits of heads, as data."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, get_args

from ..checks import check_is, finite, one_of, yes_or_no
from ..errors import InputError
from ..head import as_list
from ..prompts.positions import named
from .changes import Change, Zero, check_change

if TYPE_CHECKING:
    from ..prompts import Prompts
    from ..prompts.positions import Positions


PATCHED = ("attention", "values")
"""What `Patch` can take from a donor."""

DISTANCES = ("zero", "mean")
"""Distances at which `DropPosition` can put the keys of rotary models."""


@dataclass(frozen=True, eq=False)
class KnockOut:
    """Change heads' outputs z, before the output projection.

    Parameters
    ----------
    heads
        Heads, as `Head` or (layer, head).
    positions
        "last" (the default, as in `head_effects`), "labels", "all", `twotower.at`, or a boolean
        (prompt, position) array.
    to
        What the outputs become: `Zero` (the default), `Mean`, `Resample`, `From` or `Times`.
    """

    heads: Sequence[tuple[int, int]]
    positions: Positions = "last"
    to: Change = Zero()

    def __post_init__(self) -> None:
        object.__setattr__(self, "heads", tuple(as_list(self.heads)))
        check_change(self.to)

    def describe(self) -> dict[str, Any]:
        """Return the edit as attributes of a dataset."""
        return _describe(self, self.to.describe())


@dataclass(frozen=True, eq=False)
class ScaleAttention:
    """Multiply heads' attention weights at some keys by a factor.

    Parameters
    ----------
    heads
        Heads, as `Head` or (layer, head).
    factor
        0 or more; 1 changes nothing, 0 cuts what is read from the keys.
    keys
        Positions that are looked at: `twotower.at`, "labels", "last", "all", or a boolean
        (prompt, position) array.
    renormalize
        Whether the weights of a position are made to sum to 1 again.
    positions
        Positions that look, in the same forms; by default the last.

    Notes
    -----
    Re-weighting attention at label positions is how Yu & Ananiadou (2024) reduce
    majority-label bias; their formula is not known here, and this is not meant as theirs.
    """

    heads: Sequence[tuple[int, int]]
    factor: float
    keys: Positions
    renormalize: bool = False
    positions: Positions = "last"

    def __post_init__(self) -> None:
        object.__setattr__(self, "heads", tuple(as_list(self.heads)))
        if finite("factor", self.factor) < 0:
            raise InputError(f"factor={self.factor} must be 0 or more: it multiplies weights")
        yes_or_no("renormalize", self.renormalize)

    def describe(self) -> dict[str, Any]:
        """Return the edit as attributes of a dataset."""
        about = {"factor": self.factor, "renormalize": self.renormalize}
        return _describe(self, {**about, "keys": named(self.keys)})


@dataclass(frozen=True, eq=False)
class DropPosition:
    """Take the position part out of heads' QK scores, and let attention follow.

    The scores of the keys become their content part (`score_content` in the glossary of
    `twotower.results.schema`), and the softmax is taken anew over all that is visible.

    Parameters
    ----------
    heads
        Heads, as `Head` or (layer, head).
    keys
        Positions that are looked at, as in `ScaleAttention`; by default all.
    positions
        Positions that look; by default the last.
    distance
        Rotary models only: "zero" puts keys at the query's own position; "mean" gives the
        mean over the distances to the label positions before the query (zero where there
        are none), which are distances that the model is used to.

    Notes
    -----
    Removing the positional term is how Yu & Ananiadou (2024) reduce recency bias; their
    formula is not known here, and this is not meant as theirs.
    """

    heads: Sequence[tuple[int, int]]
    keys: Positions = "all"
    positions: Positions = "last"
    distance: str = "zero"

    def __post_init__(self) -> None:
        object.__setattr__(self, "heads", tuple(as_list(self.heads)))
        one_of("distance", self.distance, DISTANCES)

    def describe(self) -> dict[str, Any]:
        """Return the edit as attributes of a dataset."""
        return _describe(self, {"keys": named(self.keys), "distance": self.distance})


@dataclass(frozen=True, eq=False)
class Patch:
    """Give heads the attention or the values that they have in donor prompts.

    Parameters
    ----------
    heads
        Heads, as `Head` or (layer, head).
    donor
        One donor for each prompt, aligned to it by role and number of demonstration, such
        as `prompts.reversed_labels()`.
    what
        "attention": the attention weights, on the prompt's own values; "values": the value
        vectors, under the prompt's own attention.
    positions
        Positions that look; by default the last.

    Notes
    -----
    To take over a head's whole output, use ``KnockOut(heads, to=From(donor))``.
    """

    heads: Sequence[tuple[int, int]]
    donor: Prompts
    what: str
    positions: Positions = "last"

    def __post_init__(self) -> None:
        object.__setattr__(self, "heads", tuple(as_list(self.heads)))
        check_is(self.donor, "Prompts", "donor")
        one_of("what", self.what, PATCHED)

    def describe(self) -> dict[str, Any]:
        """Return the edit as attributes of a dataset."""
        return _describe(self, {"what": self.what, "donor": self.donor.hash})


Edit = KnockOut | ScaleAttention | DropPosition | Patch


def as_edits(edits: Edit | Iterable[Edit]) -> list[Edit]:
    """Edits as a list; one edit may stand for a list of one.

    Raises
    ------
    InputError
        If something in it is not an edit.
    """
    if not isinstance(edits, (Edit, Iterable)):
        raise InputError(f"edits={edits!r} must be a list of edits, such as [KnockOut(heads)]")
    found = [edits] if isinstance(edits, Edit) else list(edits)
    for edit in found:
        if not isinstance(edit, Edit):
            names = ", ".join(kind.__name__ for kind in get_args(Edit))
            raise InputError(f"{edit!r} is not an edit; use one of {names}")
    return found


def _describe(edit: Edit, about: dict[str, Any]) -> dict[str, Any]:
    heads = [tuple(map(int, head)) for head in as_list(edit.heads)]
    positions = named(edit.positions)
    return {"edit": type(edit).__name__, "heads": heads, "positions": positions, **about}
