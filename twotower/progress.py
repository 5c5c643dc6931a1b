"""Progress of long calls: bars in terminals and notebooks, occasional lines in log files."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from .options import option, set_options

SECONDS_BETWEEN_LINES = 30.0
"""Minimum time between two progress lines in a log file."""


def in_log() -> bool:
    """Return whether standard error is a log file rather than a terminal or a notebook."""
    return not sys.stderr.isatty() and "ipykernel" not in sys.modules


class Lines:
    """Progress lines in a log file, for a `with` block; updated like a tqdm bar."""

    def __init__(self, total: int, title: str, unit: str) -> None:
        self.total, self.title, self.unit = total, title, unit
        self.done, self.printed = 0, time.monotonic()

    def __enter__(self) -> Lines:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def update(self, n: int) -> None:
        """Add n to the count, and print a line if the last one is old enough."""
        self.done += n
        now = time.monotonic()
        if now - self.printed >= SECONDS_BETWEEN_LINES and self.done < self.total:
            self.printed = now
            report(f"{self.title}: {self.done} of {self.total} {self.unit}s")


def report(line: str) -> None:
    """Print a line to standard error at once."""
    print(line, file=sys.stderr, flush=True)


def bar(total: int, title: str | None = None, unit: str = "prompt") -> Any:
    """Return a progress bar for a `with` block, as set by the option `progress`.

    Parameters
    ----------
    total
        Number of items.
    title
        Title, unless the option sets one.
    unit
        Name of one item.
    """
    progress = option("progress")
    title = progress if isinstance(progress, str) else title
    if progress and in_log():
        return Lines(total, title or "measuring", unit)
    from tqdm.auto import tqdm

    return tqdm(total=total, desc=title, unit=unit, disable=not progress, leave=False)


@contextmanager
def stage(title: str, show: bool = True) -> Iterator[None]:
    """Set the title of all bars in a `with` block; in a log file, print a line at its start.

    Parameters
    ----------
    title
        Name of the stage.
    show
        Whether to show anything.
    """
    if show and in_log():
        report(title)
    with set_options(progress=title if show else False):
        yield
