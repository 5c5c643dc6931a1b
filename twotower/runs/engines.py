"""The local engine, and the choice of an engine."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING, Any

from .engine import Engine, Outcome

if TYPE_CHECKING:
    from .engine_settings import EngineSettings


class LocalEngine:
    """One worker in this process.

    Parameters
    ----------
    make
        Function that makes the worker.
    """

    def __init__(self, make: Callable[[], Any]) -> None:
        self.worker = make()
        self.slots: dict[Hashable, Any] = {"this process": None}

    def call(self, name: str, *arguments: Any) -> Any:
        """Return the result of a method of the worker."""
        return getattr(self.worker, name)(*arguments)

    def give(self, slot: Hashable, unit: Any) -> None:
        """Store a unit for `take`."""
        self.slots[slot] = unit

    def take(self, seconds: float) -> Outcome | None:
        """Carry out the stored unit."""
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
        """Do nothing: there is no worker to stop."""


def start_engine(settings: EngineSettings, make: Callable[[], Any], threads: int | None) -> Engine:
    """Start the engine that the settings choose.

    Parameters
    ----------
    settings
        Which engine, and how many workers.
    make
        Function that makes a worker; called in the worker's process.
    threads
        CPU threads per worker.

    Raises
    ------
    InputError
        If a setting is wrong, or the cluster cannot hold a worker.
    """
    settings.check()
    if settings.engine == "local":
        return LocalEngine(make)
    from .ray_engine import RayEngine

    return RayEngine(settings, make, threads)
