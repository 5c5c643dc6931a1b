"""The engine that is this process, and the choice of one."""

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
