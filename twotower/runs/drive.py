"""Handing units to workers until none is missing: tries, stops, and what is set aside."""

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
"""Seconds after which it is seen what workers are at, though no unit came to an end."""

TRIES = 3
"""How often a unit may fail before it is set aside."""


@dataclass
class Driven:
    """What came of a run's units.

    Attributes
    ----------
    done
        Number of units that were carried out.
    failed
        Units that were set aside, with the last error.
    seconds
        Wall time.
    busy, writing
        Seconds that workers were at work, summed, and those of them for writing.
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
    say: Callable[[str], None] = lambda line: None,
) -> Driven:
    """Carry out units. Workers pull them, so that slow ones get fewer.

    A first Ctrl-C lets what is under way come to its end; a second one ends it.

    Parameters
    ----------
    engine
        The workers.
    units
        In the order in which they are best done.
    alike
        Units for which a worker needs the same things; it gets one alike, if there is any.
    seen
        Takes the engine and an outcome, or None where nothing happened for a while.
    say
        Takes lines about what went wrong.

    Raises
    ------
    StoreError
        If a worker could not write: all others could not either.
    """
    found, start = Driven(), time.perf_counter()
    waiting, tries = deque(units), Counter[Any]()
    last: dict[Any, Any] = {}
    with _stop_gently(say) as stop:
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
                _failed(outcome, waiting, tries, found, say)
            seen(engine, outcome)
        found.interrupted = stop.is_set() and bool(waiting)
    found.seconds = time.perf_counter() - start
    return found


def _failed(
    outcome: Outcome,
    waiting: deque[Any],
    tries: Counter[Any],
    found: Driven,
    say: Callable[[str], None],
) -> None:
    """Let a unit that failed be tried again at the end, or set it aside after `TRIES`."""
    error, unit = outcome.error, outcome.unit
    assert error is not None
    if isinstance(error, StoreError):
        raise error
    # What is wrong with the input, or was found, is so the next time as well.
    tries[unit] += TRIES if isinstance(error, (FindingError, InputError)) else 1
    words = in_one_line(error)
    if tries[unit] < TRIES:
        say(f"{unit} failed ({words}); it is tried again")
        waiting.append(unit)
    else:
        say(f"{unit} is set aside ({words})")
        found.failed[unit] = error


@contextmanager
def _stop_gently(say: Callable[[str], None]) -> Iterator[threading.Event]:
    """An event that a first Ctrl-C sets; a second one interrupts as usual."""
    stop = threading.Event()

    def handle(number: int, frame: Any) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()
        say("stopping when what is under way is done; Ctrl-C again stops at once")

    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = signal.signal(signal.SIGINT, handle)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)
