"""Edits of heads, as data. They say what is changed; measures carry them out."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, get_args

import numpy as np

from .checks import check_is, finite, whole, yes_or_no
from .errors import InputError

if TYPE_CHECKING:
    from .head import Head
    from .models import Model
    from .prompts import At, Prompts

    Positions = str | At | np.ndarray

ABLATIONS = ("zero", "mean", "resample")
"""What `KnockOut` can replace a head's output by."""

CHANGES = (*ABLATIONS, "patch", "scale")
"""What a sweep can change a head's output to."""

PATCHED = ("z", "attention", "values")
"""What `Patch` can take from a donor."""

DISTANCES = ("zero", "mean")
"""Distances at which `DropPosition` can put the keys of rotary models."""


@dataclass(frozen=True, eq=False)
class KnockOut:
    """Take heads' outputs z, before the output projection, out of play.

    Parameters
    ----------
    heads
        Heads, as `Head` or (layer, head).
    positions
        "all", "last", "labels", `twotower.at`, or a boolean (prompt, position) array.
    ablation
        "zero"; "mean": the mean of z over the reference prompts, by role and number of
        demonstration; "resample": the z of another prompt, drawn by `seed` from the
        reference prompts, role by role.
    reference
        Prompts for "mean" and "resample".
    seed
        Seed of the draw for "resample".

    Notes
    -----
    All positions with "zero" equals zeroing the head's columns of the output projection,
    which is how Yu & Ananiadou (2024) intervene.
    """

    heads: Sequence[Head]
    positions: Positions = "all"
    ablation: str = "zero"
    reference: Prompts | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "heads", tuple(_as_list(self.heads)))
        check_ablation(self.ablation, self.reference)
        whole("seed", self.seed)

    def describe(self) -> dict[str, Any]:
        """What is edited, for the record."""
        about: dict[str, Any] = {"ablation": self.ablation}
        if self.reference is not None:
            about |= {"reference": self.reference.hash, "seed": int(self.seed)}
        return _describe(self, about)


@dataclass(frozen=True, eq=False)
class Scale:
    """Multiply heads' outputs z by a factor.

    Parameters
    ----------
    heads
        Heads, as `Head` or (layer, head).
    factor
        1 changes nothing; 0 is a knock-out.
    positions
        As in `KnockOut`.
    """

    heads: Sequence[Head]
    factor: float
    positions: Positions = "all"

    def __post_init__(self) -> None:
        object.__setattr__(self, "heads", tuple(_as_list(self.heads)))
        finite("factor", self.factor)

    def describe(self) -> dict[str, Any]:
        """What is edited, for the record."""
        return _describe(self, {"factor": self.factor})


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

    heads: Sequence[Head]
    factor: float
    keys: Positions
    renormalize: bool = False
    positions: Positions = "last"

    def __post_init__(self) -> None:
        object.__setattr__(self, "heads", tuple(_as_list(self.heads)))
        if finite("factor", self.factor) < 0:
            raise InputError(f"factor={self.factor} must be 0 or more: it multiplies weights")
        yes_or_no("renormalize", self.renormalize)

    def describe(self) -> dict[str, Any]:
        """What is edited, for the record."""
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

    heads: Sequence[Head]
    keys: Positions = "all"
    positions: Positions = "last"
    distance: str = "zero"

    def __post_init__(self) -> None:
        object.__setattr__(self, "heads", tuple(_as_list(self.heads)))
        if self.distance not in DISTANCES:
            raise InputError(
                f"distance={self.distance!r} is not known; use one of {', '.join(DISTANCES)}"
            )

    def describe(self) -> dict[str, Any]:
        """What is edited, for the record."""
        return _describe(self, {"keys": named(self.keys), "distance": self.distance})


@dataclass(frozen=True, eq=False)
class Patch:
    """Put into heads what they have in donor prompts.

    Parameters
    ----------
    heads
        Heads, as `Head` or (layer, head).
    donor
        One donor for each prompt, aligned to it by role and number of demonstration, such
        as `prompts.reversed_labels()`.
    what
        "z": the head's output; "attention": its attention weights, on the prompt's own
        values; "values": the value vectors, under the prompt's own attention.
    positions
        Where z is replaced, or which positions look; by default the last.
    """

    heads: Sequence[Head]
    donor: Prompts
    what: str = "z"
    positions: Positions = "last"

    def __post_init__(self) -> None:
        object.__setattr__(self, "heads", tuple(_as_list(self.heads)))
        check_is(self.donor, "Prompts", "donor")
        if self.what not in PATCHED:
            raise InputError(f"what={self.what!r} is not known; use one of {', '.join(PATCHED)}")

    def describe(self) -> dict[str, Any]:
        """What is edited, for the record."""
        return _describe(self, {"what": self.what, "donor": self.donor.hash})


Edit = KnockOut | Scale | ScaleAttention | DropPosition | Patch


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
    heads = [tuple(map(int, head)) for head in _as_list(edit.heads)]
    positions = named(edit.positions)
    return {"edit": type(edit).__name__, "heads": heads, "positions": positions, **about}


def named(positions: Positions) -> Any:
    """Positions, for the record."""
    if isinstance(positions, str):
        return positions
    return positions.describe() if hasattr(positions, "describe") else "given"


def check_ablation(ablation: str, reference: Any, known: Sequence[str] = ABLATIONS) -> None:
    """Refuse an ablation that is not known, or lacks or has no use for a reference."""
    if ablation not in known:
        raise InputError(f"ablation={ablation!r} is not known; use one of {', '.join(known)}")
    if (ablation in ("zero", "scale")) != (reference is None):
        need = "needs" if reference is None else "takes no"
        raise InputError(f"ablation={ablation!r} {need} reference= prompts")
    if reference is not None:
        check_is(reference, "Prompts", "reference")


def check_change(ablation: str, reference: Any, factor: Any) -> None:
    """Refuse what a sweep cannot change heads to."""
    check_ablation(ablation, reference, CHANGES)
    finite("factor", factor)
    if factor and ablation != "scale":
        raise InputError(f"factor={factor} has a meaning with ablation='scale' alone")


def _as_list(heads: Any) -> list[Any]:
    """Heads as a list; one head may stand for a list of one."""
    from .head import Head

    if isinstance(heads, str) or not isinstance(heads, Iterable):
        raise InputError(f"heads={heads!r} must be a list of (layer, head)")
    return [heads] if isinstance(heads, Head) else list(heads)


def check_heads(heads: Iterable[Any], model: Model) -> list[Head]:
    """Heads as `Head`, each in range and none twice.

    Raises
    ------
    InputError
        If a head is no pair of numbers, is out of range, or is given twice.
    """
    from .head import Head

    found = []
    for item in _as_list(heads):
        try:
            # Not int(): it would take 0.5 for 0, and a text's digits for a head.
            if any(isinstance(x, (bool, np.bool_)) for x in item):
                raise TypeError
            layer, head = (operator.index(x) for x in item)
        except (TypeError, ValueError):
            raise InputError(f"{item!r} is not a head; give (layer, head)") from None
        if not (0 <= layer < model.n_layers and 0 <= head < model.n_heads):
            raise InputError(
                f"head {layer}.{head} is out of range: the model has layers 0 to "
                f"{model.n_layers - 1} and heads 0 to {model.n_heads - 1}"
            )
        found.append(Head(layer, head))
    if len(set(found)) != len(found):
        twice = next(h for h in found if found.count(h) > 1)
        raise InputError(f"head {twice} is given twice")
    return found
