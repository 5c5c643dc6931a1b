"""What carries out units: the interface that all engines have."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any, Protocol


@dataclass
class Outcome:
    """What became of a unit.

    Attributes
    ----------
    unit
        The unit.
    report
        What the worker returned; None if it failed.
    error
        Why it failed.
    """

    unit: Any
    report: Any = None
    error: Exception | None = None


class Engine(Protocol):
    """Workers, each of which carries out one unit at a time.

    `slots` holds a name for each that is there, and what it is busy with (None where idle).
    """

    slots: dict[Hashable, Any]

    def call(self, name: str, *arguments: Any) -> Any:
        """Result of a method of one worker."""

    def give(self, slot: Hashable, unit: Any) -> None:
        """Let an idle worker carry out a unit."""

    def take(self, seconds: float) -> Outcome | None:
        """A unit that came to an end; None if none did within so many seconds."""

    def close(self) -> None:
        """Let the workers go."""
