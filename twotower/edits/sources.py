"""Sources of edges: the parts of a model that write to the residual stream."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..checks import is_list, shown
from ..errors import InputError
from ..head import as_head, check_heads, parse_head

if TYPE_CHECKING:
    from ..models import Model

KINDS = ("embedding", "head", "mlp", "mixer", "extra")
"""Kinds of sources. "embedding" is what enters the first layer, "mixer" a layer's mixer of
positions without heads, "extra" what a block adds after its MLP (per-layer embeddings)."""


@dataclass(frozen=True, order=True)
class Source:
    """A part of the model that writes to the residual stream.

    Attributes
    ----------
    layer
        Layer of the part; -1 for the embedding.
    kind
        One of `KINDS`.
    head
        Number of the head; -1 for other kinds.
    """

    layer: int
    kind: str
    head: int = -1

    def __str__(self) -> str:
        if self.kind == "head":
            return f"{self.layer}.{self.head}"
        return self.kind if self.layer < 0 else f"{self.kind} {self.layer}"


EMBEDDING = Source(-1, "embedding")
POSITION = Source(-1, "position")
"""The learned position embedding, where the embedding is split into tokens and positions."""

Group = tuple[Source, ...]
"""Sources whose outputs are changed together."""


def name_of(group: Group) -> str:
    """Return the name of some sources, such as "2.5" or "embedding + mlp 0"."""
    return " + ".join(map(str, group))


def all_sources(model: Model, below: int | None = None) -> list[Source]:
    """Return everything that writes to the residual stream below a layer, from the bottom up."""
    architecture = model.architecture
    found = [EMBEDDING]
    for layer in range(model.n_layers if below is None else below):
        found += [Source(layer, "head", n) for n in range(architecture.heads_in(layer))]
        if architecture.mixes(layer):
            found.append(Source(layer, "mixer"))
        if architecture.has_mlp(layer):
            found.append(Source(layer, "mlp"))
        if architecture.writes_more(layer):
            found.append(Source(layer, "extra"))
    return found


def as_sources(model: Model, given: Any) -> list[Group]:
    """Return groups of sources from a user's list.

    Parameters
    ----------
    model
        The model.
    given
        None for all sources; "heads" for all heads; or a list of heads (layer, head), names such
        as "2.5", "mlp 2" and "embedding", and lists of them, which are changed together.

    Raises
    ------
    InputError
        If a source does not exist, or is given twice.
    """
    known = all_sources(model)
    if given is None:
        return [(one,) for one in known]
    if isinstance(given, str) and given == "heads":
        return [(one,) for one in known if one.kind == "head"]
    if not is_list(given):
        raise InputError(f"sources={shown(given)} must be a list of heads and names, or 'heads'")
    groups: list[Group] = []
    for item in given:
        alone = isinstance(item, str | Source) or _is_head(item)
        if not alone and not is_list(item):
            raise InputError(
                f"{shown(item)} is not a source; write a head, 'mlp 2', or 'embedding'"
            )
        parts = [_as_source(model, one, known) for one in ([item] if alone else item)]
        if not parts:
            raise InputError("a group of sources is empty")
        if len(set(parts)) < len(parts):
            raise InputError(f"a source is given twice in {name_of(tuple(parts))}")
        groups.append(tuple(sorted(parts)))
    if not groups:
        raise InputError("there are no sources")
    if len(set(groups)) < len(groups):
        twice = next(group for group in groups if groups.count(group) > 1)
        raise InputError(f"the source {name_of(twice)} is given twice")
    return groups


def _is_head(item: Any) -> bool:
    try:
        as_head(item)
    except InputError:
        return False
    return True


def _as_source(model: Model, given: Any, known: list[Source]) -> Source:
    if isinstance(given, Source):
        found = given
    elif isinstance(given, str):
        found = parse_source(given)
    else:
        found = Source(as_head(given).layer, "head", as_head(given).head)
    if found.kind == "head":
        check_heads([(found.layer, found.head)], model)
    elif found not in known:
        raise InputError(
            f"the model has no source {str(found)!r}; it has layers 0 to {model.n_layers - 1}"
        )
    return found


def parse_source(text: str) -> Source:
    """Return a source written as "2.5", "mlp 2" or "embedding".

    Raises
    ------
    InputError
        If the text has another form.
    """
    if text == "embedding":
        return EMBEDDING
    match = re.fullmatch(r"(mlp|mixer|extra) (\d+)", text)
    if match:
        return Source(int(match[2]), match[1])
    try:
        head = parse_head(text)
    except InputError:
        raise InputError(
            f"{text!r} is not a source; write a head as 2.5, or 'mlp 2', or 'embedding'"
        ) from None
    return Source(head.layer, "head", head.head)
