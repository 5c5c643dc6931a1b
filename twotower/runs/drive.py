"""The loop that gives units to workers, with retries and a gentle stop."""

from __future__ import annotations

import signal
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from ..errors import FindingError, InputError, StoreError, in_one_line
from .engine import Engine, Outcome

POLL = 1.0
"""Seconds between two updates of the workers' state while no unit finishes."""

TRIES = 3
"""Number of failures after which a unit is no longer retried."""


@dataclass
class Driven:
    """Result of driving a run's units.

    Attributes
    ----------
    done
        Number of units that succeeded.
    failed
        Units that failed for good, with the last error.
    seconds
        Wall time.
    busy, writing
        Seconds of work, summed over workers, and the part spent on writing.
    interrupted
        Whether it was stopped before the end.
    """

    done: int = 0
    failed: dict[Any, Exception] = field(default_factory=dict)
    seconds: float = 0.0
    busy: float = 0.0
    writing: float = 0.0
    interrupted: bool = False


def drive(
    engine: Engine,
    units: Iterable[Any],
    *,
    alike: Callable[[Any], Hashable] = lambda unit: None,
    seen: Callable[[Engine, Outcome | None], None] = lambda engine, outcome: None,
    log: Callable[[str], None] = lambda line: None,
) -> Driven:
    """Carry out units. Workers pull them, so slow workers get fewer.

    A first Ctrl-C lets running units finish; a second one stops at once.

    Parameters
    ----------
    engine
        The workers.
    units
        In preferred order.
    alike
        Key of a unit; a worker prefers units with the key of its last one.
    seen
        Called with the engine and an outcome, or None if none came for a while.
    log
        Called with lines about failures.

    Raises
    ------
    StoreError
        If a worker cannot write; then no other can.
    """
    found, start = Driven(), time.perf_counter()
    waiting, tries = deque(units), Counter[Any]()
    last: dict[Any, Any] = {}
    with _stop_gently(log) as stop:
        while True:
            for slot, busy in list(engine.slots.items()):
                if busy is None and waiting and not stop.is_set():
                    kind = last.get(slot)
                    unit = next((one for one in waiting if alike(one) == kind), waiting[0])
                    waiting.remove(unit)
                    last[slot] = alike(unit)
                    engine.give(slot, unit)
            idle = all(busy is None for busy in engine.slots.values())
            if idle and (not waiting or stop.is_set()):
                break
            outcome = engine.take(POLL)
            if outcome is not None and outcome.error is None:
                found.done += 1
                found.busy += getattr(outcome.report, "seconds", 0.0)
                found.writing += getattr(outcome.report, "writing", 0.0)
            elif outcome is not None:
                _failed(outcome, waiting, tries, found, log)
            seen(engine, outcome)
        found.interrupted = stop.is_set() and bool(waiting)
    found.seconds = time.perf_counter() - start
    return found


def _failed(
    outcome: Outcome,
    waiting: deque[Any],
    tries: Counter[Any],
    found: Driven,
    log: Callable[[str], None],
) -> None:
    """Queue a failed unit again, or record it as failed after `TRIES`."""
    error, unit = outcome.error, outcome.unit
    assert error is not None
    if isinstance(error, StoreError):
        raise error
    # Input errors and findings do not go away on a retry.
    tries[unit] += TRIES if isinstance(error, (FindingError, InputError)) else 1
    words = in_one_line(error)
    if tries[unit] < TRIES:
        log(f"{unit} failed ({words}); it will be retried")
        waiting.append(unit)
    else:
        log(f"{unit} failed for good ({words})")
        found.failed[unit] = error


@contextmanager
def _stop_gently(log: Callable[[str], None]) -> Iterator[threading.Event]:
    """Yield an event that a first Ctrl-C sets; a second one interrupts as usual."""
    stop = threading.Event()

    def handle(number: int, frame: Any) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()
        log("stopping after the running units; Ctrl-C again stops at once")

    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = signal.signal(signal.SIGINT, handle)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)
