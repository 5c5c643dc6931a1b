"""Edits of heads, of what they read, and of the residual stream: six data classes."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, get_args

import numpy as np

from ..checks import check_is, finite, is_list, one_of, several, shown, whole, yes_or_no
from ..errors import InputError
from ..head import as_list
from ..prompts.positions import named
from .changes import Change, Zero, check_change

if TYPE_CHECKING:
    from ..prompts import Prompts
    from ..prompts.positions import Positions


PATCHED = ("attention", "values")
"""Quantities that `Patch` can take from a donor."""

DISTANCES = ("zero", "mean")
"""Query-key distances that `DropPosition` can use for rotary models."""


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
        New outputs: `Zero` (the default), `Mean`, `Resample`, `From` or `Times`.
    """

    heads: Sequence[tuple[int, int]]
    positions: Positions = "last"
    to: Change = Zero()

    def __post_init__(self) -> None:
        object.__setattr__(self, "heads", tuple(as_list(self.heads)))
        _own_arrays(self)
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
        0 or more. 1 changes nothing; 0 blocks attention to the keys.
    keys
        Key positions: `twotower.at`, "labels", "last", "all", or a boolean (prompt, position)
        array.
    renormalize
        Whether to rescale each query's weights to sum to 1 again.
    positions
        Query positions, in the same forms; by default the last.

    Notes
    -----
    Yu & Ananiadou (2024) re-weight attention at label positions to reduce majority-label bias.
    We do not know their formula; this edit does not claim to reproduce it.
    """

    heads: Sequence[tuple[int, int]]
    factor: float
    keys: Positions
    renormalize: bool = False
    positions: Positions = "last"

    def __post_init__(self) -> None:
        object.__setattr__(self, "heads", tuple(as_list(self.heads)))
        _own_arrays(self)
        object.__setattr__(self, "factor", finite("factor", self.factor))
        if self.factor < 0:
            raise InputError(f"factor={self.factor} must be 0 or more: it multiplies weights")
        yes_or_no("renormalize", self.renormalize)

    def describe(self) -> dict[str, Any]:
        """Return the edit as attributes of a dataset."""
        about = {"factor": self.factor, "renormalize": self.renormalize}
        return _describe(self, {**about, "keys": named(self.keys)})


@dataclass(frozen=True, eq=False)
class DropPosition:
    """Remove the position part of heads' QK scores and recompute attention.

    The scores of the keys are replaced by their content part (`score_content` in
    `twotower/results/groups/heads.py`). The softmax is then recomputed over all visible keys.

    Parameters
    ----------
    heads
        Heads, as `Head` or (layer, head).
    keys
        Key positions, as in `ScaleAttention`; by default all.
    positions
        Query positions; by default the last.
    distance
        Rotary models only. "zero" puts keys at the query's own position. "mean" averages over
        the distances to the label positions up to the query (zero if there are none); the
        model is used to these distances.

    Notes
    -----
    Yu & Ananiadou (2024) remove the positional term to reduce recency bias. We do not know
    their formula; this edit does not claim to reproduce it.
    """

    heads: Sequence[tuple[int, int]]
    keys: Positions = "all"
    positions: Positions = "last"
    distance: str = "zero"

    def __post_init__(self) -> None:
        object.__setattr__(self, "heads", tuple(as_list(self.heads)))
        _own_arrays(self)
        one_of("distance", self.distance, DISTANCES)

    def describe(self) -> dict[str, Any]:
        """Return the edit as attributes of a dataset."""
        return _describe(self, {"keys": named(self.keys), "distance": self.distance})


@dataclass(frozen=True, eq=False)
class Patch:
    """Replace heads' attention or values by those of donor prompts.

    Parameters
    ----------
    heads
        Heads, as `Head` or (layer, head).
    donor
        One donor for each prompt, aligned to it by role and number of demonstration, such
        as `prompts.reversed_labels()`. An answer of several tokens follows the donor as it
        follows the prompt.
    what
        "attention": the donor's attention weights with the prompt's own values. "values": the
        donor's value vectors with the prompt's own attention.
    positions
        Query positions; by default the last.

    Notes
    -----
    To patch a head's whole output, use ``KnockOut(heads, to=From(donor))``.
    """

    heads: Sequence[tuple[int, int]]
    donor: Prompts
    what: str
    positions: Positions = "last"

    def __post_init__(self) -> None:
        object.__setattr__(self, "heads", tuple(as_list(self.heads)))
        _own_arrays(self)
        check_is(self.donor, "Prompts", "donor")
        one_of("what", self.what, PATCHED)

    def describe(self) -> dict[str, Any]:
        """Return the edit as attributes of a dataset."""
        return _describe(self, {"what": self.what, "donor": self.donor.hash})


@dataclass(frozen=True, eq=False)
class Add:
    """Add a vector to the residual stream that enters a layer, such as a function vector.

    Parameters
    ----------
    vector
        (d_model,) numbers, such as the result of `function_vector`. If that was made on other
        weights, a warning says so.
    layer
        The layer; later ones read the changed stream too.
    positions
        "last" (the default), "labels", "all", `twotower.at`, or a boolean (prompt, position)
        array.

    Attributes
    ----------
    made_on
        Name and weights' hash of the model on which the vector was made, if it knows them.
    """

    vector: Any
    layer: int
    positions: Positions = "last"
    made_on: dict[str, str] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        values = getattr(self.vector, "vector", self.vector)
        try:
            if hasattr(values, "detach"):
                values = values.detach().cpu()
                values = values if values.is_complex() else values.float()
                values = values.numpy()
            found = np.array(values).astype(np.float32, casting="same_kind")
        except (TypeError, ValueError):
            raise InputError(
                f"vector must be numbers (d_model,); this is {shown(self.vector)}"
            ) from None
        if found.ndim != 1:
            raise InputError(
                f"vector must be finite numbers (d_model,); this is of shape {found.shape}"
            )
        wrong = int((~np.isfinite(found)).sum())
        if wrong:
            raise InputError(f"vector must be finite numbers; {wrong} of {found.size} are not")
        about = getattr(self.vector, "attrs", {})
        made_on = {name: about[name] for name in ("model", "weights_hash") if about.get(name)}
        object.__setattr__(self, "made_on", made_on)
        object.__setattr__(self, "vector", found)
        _own_arrays(self)
        whole("layer", self.layer)

    @property
    def heads(self) -> tuple[()]:
        """No heads: the edit changes the residual stream."""
        return ()

    def describe(self) -> dict[str, Any]:
        """Return the edit as attributes of a dataset."""
        digest = hashlib.sha256(self.vector.tobytes()).hexdigest()
        made_on = {"made_on": self.made_on} if self.made_on else {}
        return _describe(self, {"layer": int(self.layer), "vector": digest, **made_on})


@dataclass(frozen=True, eq=False)
class CutEdges:
    """Take sources out of what heads read, or out of what the answer is read from.

    A target reads the residual stream of this run with the source's write subtracted and the
    source's new output added; all others read the stream as it is. So a circuit is tested by
    cutting all edges that do not belong to it. The effect of one edge is that of `edge_effects`.

    Parameters
    ----------
    edges
        (source, target, into): a source is a head (layer, head), "2.5", "mlp 2" or "embedding";
        a target is a head, read through its queries "q", keys "k" or values "v", or "answer" with
        "answer": the residual stream that enters the final norm.
    positions
        Positions at which keys and values read the changed stream; by default all.
    outputs
        Positions at which the targets' outputs change, and their queries and the answer read the
        changed stream; by default the last.
    to
        New output of the sources: `Zero` (the default), `Mean`, `Resample`, `From` or `Times`; of
        MLPs and the embedding, what they add to the residual stream.

    Notes
    -----
    A target's gate and its sinks stay as they are. A cut into queries or keys is an edit of the
    head's attention, one into values an edit of its values: no other edit of the same can be given
    beside it. So all edges to cut belong into one `CutEdges`.

    Where a norm stands between heads and the residual stream, the cut heads of a layer are taken
    out of this norm's input together; so the effects of two such edges need not add up.

    If nearly all of a stream is cut, its rounding error would be left, which the next norm
    amplifies. Therefore the error is shared: what is left keeps as much of it as it has of the
    stream's energy, and nothing if all is cut.
    """

    edges: Sequence[tuple[Any, Any, str]]
    positions: Positions = "all"
    outputs: Positions = "last"
    to: Change = Zero()

    def __post_init__(self) -> None:
        edges = tuple(several("edges", self.edges))
        if not edges:
            raise InputError("there are no edges to cut")
        for edge in edges:
            if isinstance(edge, str) or not isinstance(edge, Sequence) or len(edge) != 3:
                raise InputError(f"{shown(edge)} is not an edge; write (source, target, into)")
        object.__setattr__(self, "edges", edges)
        _own_arrays(self)
        check_change(self.to)

    def describe(self) -> dict[str, Any]:
        """Return the edit as attributes of a dataset."""
        listed = json.dumps([[str(part) for part in edge] for edge in self.edges])
        return {
            "edit": "CutEdges",
            "edges": len(self.edges),
            "edges_hash": hashlib.sha256(listed.encode()).hexdigest(),
            "positions": named(self.positions),
            "outputs": named(self.outputs),
            **self.to.describe(),
        }


HeadEdit = KnockOut | ScaleAttention | DropPosition | Patch
Edit = HeadEdit | Add | CutEdges


def as_edits(edits: Edit | Iterable[Edit]) -> list[Edit]:
    """Return edits as a list; a single edit becomes a list of one.

    Raises
    ------
    InputError
        If an element is not an edit.
    """
    if isinstance(edits, Edit):
        return [edits]
    if not is_list(edits):
        raise InputError(f"edits={shown(edits)} must be a list of edits, such as [KnockOut(heads)]")
    found = list(edits)
    for edit in found:
        if not isinstance(edit, Edit):
            names = ", ".join(kind.__name__ for kind in get_args(Edit))
            raise InputError(f"{shown(edit)} is not an edit; use one of {names}")
    return found


def _own_arrays(edit: Any) -> None:
    """Copy an edit's arrays of positions, which the user may change later."""
    for name in ("positions", "keys", "outputs"):
        given = getattr(edit, name, None)
        if hasattr(given, "__array__"):
            object.__setattr__(edit, name, copy.deepcopy(given))


def _describe(edit: HeadEdit | Add, about: dict[str, Any]) -> dict[str, Any]:
    heads = [tuple(map(int, head)) for head in as_list(edit.heads)]
    positions = named(edit.positions)
    return {"edit": type(edit).__name__, "heads": heads, "positions": positions, **about}
