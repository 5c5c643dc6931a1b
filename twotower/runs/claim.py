"""Who drives a run: one process at a time, as far as it is known to be alive."""

from __future__ import annotations

import os
import socket
import threading
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Protocol

import psutil

from ..errors import StoreError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ..results.place import Place
    from .engine import Engine

EVERY = 10.0
"""Seconds between two signs of life."""

SILENT = 60.0
"""Seconds after which a driver on another host counts as dead."""


class Claimed(Protocol):
    """What can be claimed: a run's store, or the ledger of a folder of experiments."""

    place: Place

    def driver(self) -> dict[str, Any]:
        """Who drives it, as was said last; empty where nobody does."""

    def beat(self, driver: Mapping[str, Any] | None) -> None:
        """Say who drives it, or that nobody does any more."""


class Claim:
    """Says in the store, as long as a `with` block lasts, that this process drives the run.

    Parameters
    ----------
    store
        The run's store.
    engine
        Whose units under way are told.

    Raises
    ------
    StoreError
        If another process drives it.
    """

    def __init__(self, store: Claimed, engine: Engine) -> None:
        other = store.driver()
        if alive(other):
            raise StoreError(
                f"{store.place} is being measured by process {other['process']} on "
                f"{other['host']}; wait for it, or stop it"
            )
        self.store, self.engine = store, engine
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self._beat, daemon=True)

    def __enter__(self) -> Claim:
        self.store.beat(self._about())
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        self.thread.join()
        with suppress(Exception):  # whoever comes next finds this process gone
            self.store.beat(None)

    def _beat(self) -> None:
        while not self.ended.wait(EVERY):
            with suppress(Exception):  # a store that refuses is the units' concern
                self.store.beat(self._about())

    def _about(self) -> dict[str, Any]:
        busy = [unit for unit in list(self.engine.slots.values()) if unit is not None]
        return {
            "host": socket.gethostname(),
            "process": os.getpid(),
            "started": psutil.Process().create_time(),
            "beat": time.time(),
            "workers": len(self.engine.slots),
            "running": [unit.number for unit in busy],
        }


def alive(driver: dict[str, Any], itself: bool = False) -> bool:
    """Whether who drives a run still does; this process counts only if `itself`."""
    if not driver:
        return False
    if driver["host"] != socket.gethostname():
        return bool(time.time() - driver["beat"] < SILENT)
    if driver["process"] == os.getpid():
        return itself
    try:
        return bool(psutil.Process(driver["process"]).create_time() == driver["started"])
    except psutil.Error:
        return False
