"""What carries out units: an interface, and the engine that is this process."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from .engine_settings import EngineSettings


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


class LocalEngine:
    """One worker in this process.

    Parameters
    ----------
    make
        Makes the worker.
    """

    def __init__(self, make: Callable[[], Any]) -> None:
        self.worker = make()
        self.slots: dict[Hashable, Any] = {"this process": None}

    def call(self, name: str, *arguments: Any) -> Any:
        """Result of a method of the worker."""
        return getattr(self.worker, name)(*arguments)

    def give(self, slot: Hashable, unit: Any) -> None:
        """Keep a unit for `take`."""
        self.slots[slot] = unit

    def take(self, seconds: float) -> Outcome | None:
        """Carry out the unit that was given."""
        ((slot, unit),) = self.slots.items()
        if unit is None:
            return None
        try:
            return Outcome(unit, self.worker(unit))
        except Exception as error:
            return Outcome(unit, error=error)
        finally:
            self.slots[slot] = None

    def close(self) -> None:
        """Nothing is held but what this process holds."""


def start_engine(settings: EngineSettings, make: Callable[[], Any], threads: int | None) -> Engine:
    """The engine that settings ask for.

    Parameters
    ----------
    settings
        Which engine, and how many workers.
    make
        Makes a worker; called where the worker is.
    threads
        CPU threads of a worker.

    Raises
    ------
    InputError
        If settings make no sense, or the cluster cannot hold a worker.
    """
    settings.check()
    if settings.engine == "local":
        return LocalEngine(make)
    from .ray_engine import RayEngine

    return RayEngine(settings, make, threads)
