"""Workers on a Ray cluster: one actor for each model replica."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Hashable
from contextlib import suppress
from typing import Any

from ..errors import InputError, TwoTowerError, WorkerError
from .engine import Outcome
from .engine_settings import EngineSettings

STARTS = 3
"""Number of workers in a row that may die while starting."""

PLACING = 300.0
"""Seconds to wait for the first worker to start."""


class Replica:
    """Ray actor: a worker, its number of threads, and its working folder."""

    def __init__(self, make: Callable[[], Any], threads: int, folder: str) -> None:
        import torch

        with suppress(OSError):  # on a node without the folder, relative paths fail later
            os.chdir(folder)
        torch.set_num_threads(threads)
        self.worker = make()

    def ready(self) -> str:
        """Return the worker's name."""
        return str(getattr(self.worker, "name", os.getpid()))

    def measure(self, unit: Any) -> Any:
        """Carry out a unit."""
        return self.worker(unit)

    def call(self, name: str, *arguments: Any) -> Any:
        """Call another method of the worker."""
        return getattr(self.worker, name)(*arguments)


class RayEngine:
    """Workers on a Ray cluster, which is started on this machine or joined.

    A worker that dies is replaced where there is room for another.

    Parameters
    ----------
    settings
        How many workers, over how many GPUs each, and the cluster.
    make
        Function that makes a worker.
    threads
        CPU threads per worker; by default the cluster's CPUs are shared out.

    Raises
    ------
    InputError
        If Ray is not installed, the cluster cannot be joined, or it cannot hold a worker.
    WorkerError
        If no worker starts.
    """

    def __init__(
        self, settings: EngineSettings, make: Callable[[], Any], threads: int | None
    ) -> None:
        try:
            import ray
        except ImportError as error:
            raise InputError("--engine ray needs Ray: pip install 'twotower[ray]'") from error
        self.ray = ray
        self.slots: dict[Hashable, Any] = {}
        self.began = not ray.is_initialized()
        self._join(settings.address)
        try:
            wanted, self.options, self.threads = self._placement(settings, threads)
            self.make = ray.put(make)
            self.stillborn = 0
            self.actors: dict[Hashable, Any] = {}
            self.starting: dict[Any, Any] = {}
            self.work: dict[Any, Hashable] = {}
            for _ in range(wanted):
                self._start()
            self._wait_for_one()
        except BaseException:
            self.close()
            raise

    def _join(self, address: str | None) -> None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        if not self.began:
            return
        try:
            _answers(address)
            # Without an address Ray would join the cluster last started on this machine.
            where = address or os.environ.get("RAY_ADDRESS", "local")
            self.ray.init(address=where, log_to_driver=False, logging_level="error")
        except Exception as error:
            raise InputError(
                f"the Ray cluster at {address!r} cannot be joined: "
                f"{' '.join(str(error).split())[:300]}"
            ) from error

    def _placement(
        self, settings: EngineSettings, threads: int | None
    ) -> tuple[int, dict[str, Any], int]:
        """Return the number of workers, the resources of each, and its threads."""
        nodes = [node["Resources"] for node in self.ray.nodes() if node["Alive"]]
        has = "; ".join(f"{n.get('GPU', 0):g} GPUs, {n.get('CPU', 0):g} CPUs" for n in nodes)
        gpus = settings.gpus_per_replica
        if gpus is None:
            gpus = 1 if any(n.get("GPU", 0) >= 1 for n in nodes) else 0
        cpus = threads or 1
        fit = [
            int(min(n.get("CPU", 0) // cpus, n.get("GPU", 0) // gpus if gpus else float("inf")))
            for n in nodes
        ]
        wanted = settings.workers or (sum(fit) if gpus or threads else min(1, sum(fit)))
        if not sum(fit) or wanted > sum(fit):
            each = f"{gpus} GPUs and {cpus} CPUs" if gpus else f"{cpus} CPUs"
            raise InputError(
                f"the Ray cluster holds {sum(fit)} workers of {each} each, not {max(wanted, 1)}; "
                f"its nodes have: {has or 'nothing'}"
            )
        if threads is None:
            total = sum(int(n.get("CPU", 0)) for n in nodes)
            threads = max(1, total // wanted) if len(nodes) == 1 else cpus
        return wanted, {"num_cpus": cpus, "num_gpus": gpus, "max_restarts": 0}, threads

    def _start(self) -> None:
        """Ask for one more worker."""
        actor = (
            self.ray.remote(Replica)
            .options(**self.options)
            .remote(self.make, self.threads, os.getcwd())
        )
        self.starting[actor.ready.remote()] = actor

    def _wait_for_one(self) -> None:
        """Wait until a worker has started."""
        end = time.monotonic() + PLACING
        while not self.slots:
            self._started(1.0)
            if not self.slots and (time.monotonic() > end or not self.starting):
                raise WorkerError(
                    f"no worker could be placed within {PLACING:.0f} s; the cluster has "
                    f"{self.ray.available_resources()} free"
                )

    def _started(self, seconds: float) -> None:
        """Register workers that have started."""
        ready, _ = (
            self.ray.wait(list(self.starting), timeout=seconds) if self.starting else ([], [])
        )
        for reference in ready:
            actor = self.starting.pop(reference)
            try:
                name = self.ray.get(reference)
            except self.ray.exceptions.RayError as error:
                self.stillborn += 1
                if self.stillborn == STARTS:
                    words = str(error).strip().splitlines()[-1]  # the end of a traceback
                    raise WorkerError(f"workers die while starting: {words}") from error
                self._start()
                continue
            self.stillborn = 0
            self.actors[name] = actor
            self.slots[name] = None

    def call(self, name: str, *arguments: Any) -> Any:
        """Return the result of a method of one worker; use another if it dies."""
        while True:
            self._wait_for_one()
            slot = next(iter(self.slots))
            try:
                return self.ray.get(self.actors[slot].call.remote(name, *arguments))
            except self.ray.exceptions.RayActorError:
                self._lost(slot)
            except self.ray.exceptions.RayTaskError as error:
                raise _cause(error) from error

    def give(self, slot: Hashable, unit: Any) -> None:
        """Give a unit to an idle worker."""
        self.slots[slot] = unit
        self.work[self.actors[slot].measure.remote(unit)] = slot

    def take(self, seconds: float) -> Outcome | None:
        """Return the outcome of a finished unit; None if none finishes within `seconds`."""
        waiting = [*self.work, *self.starting]
        if not waiting:
            self._wait_for_one()
            return None
        ready, _ = self.ray.wait(waiting, timeout=seconds)
        self._started(0)
        if not self.slots:
            self._wait_for_one()
        for reference in ready:
            if reference not in self.work:
                continue
            slot = self.work.pop(reference)
            unit = self.slots[slot]
            self.slots[slot] = None
            try:
                return Outcome(unit, self.ray.get(reference))
            except self.ray.exceptions.RayTaskError as error:
                return Outcome(unit, error=_cause(error))
            except self.ray.exceptions.RayError as error:
                self._lost(slot)
                words = str(error).strip().splitlines()[0]
                return Outcome(unit, error=WorkerError(f"its worker {slot} died ({words})"))
        return None

    def _lost(self, slot: Hashable) -> None:
        """Replace a worker that died."""
        del self.slots[slot], self.actors[slot]
        self._start()

    def close(self) -> None:
        """Stop the workers, and the cluster if it was started here."""
        for actor in [
            *getattr(self, "actors", {}).values(),
            *getattr(self, "starting", {}).values(),
        ]:
            self.ray.kill(actor)
        if self.began:
            self.ray.shutdown()


def _answers(address: str | None) -> None:
    """Check that a server listens at an address; Ray itself would wait for minutes."""
    host, colon, port = (address or "").removeprefix("ray://").rpartition(":")
    if colon and port.isdigit():
        socket.create_connection((host, int(port)), timeout=10).close()


def _cause(error: Any) -> Exception:
    """Return the worker's exception, as a local call would raise it."""
    cause = error.cause if isinstance(getattr(error, "cause", None), Exception) else error
    return cause if isinstance(cause, TwoTowerError) else error.as_instanceof_cause()
