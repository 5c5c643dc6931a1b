"""The name of an attention head."""

from __future__ import annotations

from typing import NamedTuple


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
