"""The interface of all engines, which carry out units."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any, Protocol


@dataclass
class Outcome:
    """Outcome of a unit.

    Attributes
    ----------
    unit
        The unit.
    report
        Return value of the worker; None if it failed.
    error
        The exception if it failed.
    """

    unit: Any
    report: Any = None
    error: Exception | None = None


class Engine(Protocol):
    """Workers, each of which carries out one unit at a time.

    `slots` maps the name of each worker to its current unit (None if idle).
    """

    slots: dict[Hashable, Any]

    def call(self, name: str, *arguments: Any) -> Any:
        """Return the result of a method of one worker."""

    def give(self, slot: Hashable, unit: Any) -> None:
        """Give a unit to an idle worker."""

    def take(self, seconds: float) -> Outcome | None:
        """Return the outcome of a finished unit; None if none finishes within `seconds`."""

    def close(self) -> None:
        """Stop the workers."""
