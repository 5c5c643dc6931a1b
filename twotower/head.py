"""Attention heads, and checks of heads given by users."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any, NamedTuple, Protocol

import numpy as np

from .checks import is_list, shown
from .errors import InputError


class Head(NamedTuple):
    """An attention head.

    Parameters
    ----------
    layer, head
        Both count from 0.
    """

    layer: int
    head: int

    def __str__(self) -> str:
        return f"{self.layer}.{self.head}"


class HasHeads(Protocol):
    """Object with heads, such as a model."""

    @property
    def n_layers(self) -> int:
        """Number of layers."""

    @property
    def n_heads(self) -> int:
        """Number of heads in a layer."""


def as_head(value: Any) -> Head:
    """Return a head given as `Head` or (layer, head).

    Raises
    ------
    InputError
        If the value is not a pair of whole numbers.
    """
    try:
        # int() would also accept 0.5 and strings of digits.
        if any(isinstance(x, (bool, np.bool_)) for x in value):
            raise TypeError
        layer, head = (operator.index(x) for x in value)
    except (TypeError, ValueError):
        raise InputError(f"{shown(value)} is not a head; give (layer, head)") from None
    return Head(layer, head)


def parse_head(text: str) -> Head:
    """Return a head written as layer.head, such as 21.3.

    Raises
    ------
    InputError
        If the text has another form.
    """
    layer, point, head = text.partition(".")
    if not point or not (layer.isdecimal() and head.isdecimal()):
        raise InputError(f"{text!r} is not a head; write layer.head, such as 21.3")
    return Head(int(layer), int(head))


def as_list(heads: Any) -> list[Any]:
    """Return heads as a list; a single head becomes a list of one."""
    if isinstance(heads, Head):
        return [heads]
    if not is_list(heads):
        raise InputError(f"heads={shown(heads)} must be a list of (layer, head)")
    return list(heads)


def check_heads(heads: Iterable[Any], model: HasHeads) -> list[Head]:
    """Return heads as `Head`, after checking that each is in range and given once.

    Raises
    ------
    InputError
        If a head is not a pair of numbers, is out of range, or is given twice.
    """
    found = []
    for item in as_list(heads):
        layer, head = as_head(item)
        if not (0 <= layer < model.n_layers and 0 <= head < model.n_heads):
            raise InputError(
                f"head {layer}.{head} is out of range: the model has layers 0 to "
                f"{model.n_layers - 1} and heads 0 to {model.n_heads - 1}"
            )
        heads_in = getattr(model, "heads_in", None)
        n = model.n_heads if heads_in is None else heads_in(layer)
        if head >= n:
            has = f"has only {n} heads" if n else "has no heads (it does not attend by softmax)"
            raise InputError(f"head {layer}.{head} does not exist: layer {layer} {has}")
        found.append(Head(layer, head))
    if len(set(found)) != len(found):
        twice = next(h for h in found if found.count(h) > 1)
        raise InputError(f"head {twice} is given twice")
    return found
