"""Progress of a run: bars of all its prompts and of each worker; in a log file, lines."""

from __future__ import annotations

import sys
import time
from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING, Any

from ..progress import Lines, in_log

if TYPE_CHECKING:
    from ..results.units import Unit
    from .engine import Engine, Outcome


class Bars:
    """Progress bars in a `with` block; in a log file, a line now and then.

    Parameters
    ----------
    units, missing
        All units, and those still to measure.
    shown
        Whether to show the bars.
    """

    def __init__(self, units: Sequence[Unit], missing: Sequence[Unit], shown: bool) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        self.bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed:.0f} of {task.total:.0f} prompts"),
            TextColumn("{task.fields[about]}"),
            TimeRemainingColumn(),
            console=Console(file=sys.stderr),
            disable=not shown or in_log(),
            transient=True,
        )
        total = sum(unit.stop - unit.start for unit in units)
        left = sum(unit.stop - unit.start for unit in missing)
        self.whole = self.bars.add_task("all", total=total, completed=total - left, about="")
        self.workers: dict[Hashable, Any] = {}
        self.done: dict[Hashable, int] = {}
        self.lines = Lines(total, "measured", "prompt") if shown and in_log() else None
        if self.lines is not None:
            self.lines.done = total - left
        self.began = time.perf_counter()
        self.left = left

    def __enter__(self) -> Bars:
        self.bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bars.stop()

    def seen(self, engine: Engine, outcome: Outcome | None) -> None:
        """Update the bars after an outcome (None if there is none)."""
        if outcome is not None and outcome.error is None:
            n = outcome.unit.stop - outcome.unit.start
            self.bars.advance(self.whole, n)
            if self.lines is not None:
                self.lines.update(n)
            name = outcome.report.worker
            self.done[name] = self.done.get(name, 0) + n
        for name in [*self.workers]:
            if name not in engine.slots:
                self.bars.remove_task(self.workers.pop(name))
        for name, unit in engine.slots.items():
            if name not in self.workers:
                self.workers[name] = self.bars.add_task(str(name), total=self.left, about="")
            about = "idle" if unit is None else f"unit {unit.number}"
            done = self.done.get(name, sum(self.done.values()) if len(engine.slots) == 1 else 0)
            self.bars.update(self.workers[name], completed=done, about=about)
