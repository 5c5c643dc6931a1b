"""The claim on a run: only one live process drives it."""

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
"""Seconds between two heartbeats."""

SILENT = 60.0
"""Seconds without a heartbeat after which a driver on another host counts as dead."""


class Claimed(Protocol):
    """Object that can be claimed: a run's store, or the ledger of a folder of experiments."""

    place: Place

    def driver(self) -> dict[str, Any]:
        """Return the last recorded driver, or an empty dict."""

    def beat(self, driver: Mapping[str, Any] | None) -> None:
        """Record the driver, or None when it stops."""


class Claim:
    """Context manager that records this process in the store as the run's driver.

    Parameters
    ----------
    store
        The run's store.
    engine
        Engine whose running units are recorded.

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
        with suppress(Exception):  # the next driver sees that this process is gone
            self.store.beat(None)

    def _beat(self) -> None:
        while not self.ended.wait(EVERY):
            with suppress(Exception):  # writing the units reports a failing store
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
    """Whether the driver is alive; this process counts only if `itself`."""
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
