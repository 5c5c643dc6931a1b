"""Bars: all prompts, and what each worker is at."""

from __future__ import annotations

import io
import sys

import pytest

from twotower.results.units import plan_units
from twotower.runs.engine import Outcome
from twotower.runs.progress import Bars
from twotower.runs.worker import Report


class Workers:
    """What bars see of an engine."""

    def __init__(self) -> None:
        self.slots = {"a:1": None, "b:2": None}


def test_bars_show_all_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    monkeypatch.setattr("twotower.runs.progress.in_log", lambda: False)
    units = plan_units({"": 10}, 3)
    engine = Workers()
    with Bars(units, units[1:], shown=True) as bars:
        engine.slots["a:1"] = units[1]
        bars.seen(engine, None)
        engine.slots["b:2"] = units[2]
        bars.seen(engine, Outcome(units[1], Report(1.0, 0.1, "a:1")))
        shown = {task.description: task for task in bars.bars.tasks}
        assert shown["all"].completed == 6  # of the first unit, three were done before
        assert shown["all"].total == 10
        assert (shown["a:1"].completed, shown["b:2"].completed) == (3, 0)
        assert shown["b:2"].fields["about"] == "unit 2"
        # A failed unit moves nothing; a worker that is gone is not shown any more.
        del engine.slots["b:2"]
        engine.slots["c:3"] = units[2]
        bars.seen(engine, Outcome(units[2], error=RuntimeError("a bad day")))
        shown = {task.description: task for task in bars.bars.tasks}
        assert set(shown) == {"all", "a:1", "c:3"}
        assert shown["all"].completed == 6


def test_lines_in_log_files(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("twotower.progress.SECONDS_BETWEEN_LINES", 0.0)
    units = plan_units({"": 9}, 3)
    with Bars(units, units[1:], shown=True) as bars:
        bars.seen(Workers(), Outcome(units[1], Report(1.0, 0.1, "a:1")))
        bars.seen(Workers(), Outcome(units[2], Report(1.0, 0.1, "a:1")))
    assert capsys.readouterr().err == "measured: 6 of 9 prompts\n"


def test_no_bars_in_log_files(capsys: pytest.CaptureFixture[str]) -> None:
    units = plan_units({"": 4}, 2)
    with Bars(units, units, shown=False) as bars:
        bars.seen(Workers(), Outcome(units[0], Report(1.0, 0.1, "a:1")))
    printed = capsys.readouterr()
    assert printed.out == printed.err == ""
