"""How long the tests may take, part by part; printed beside what they took.

Seconds of all workers together, on two quiet cores: the processor time that a part takes, and what
it waits. `make test` runs two workers, so that it takes about half of the sum. The last line is the
processor time of everything, with what collects tests and every process that was started. What is
over its budget is reported and fails no test, since machines are shared. Make it faster, or change
the budget and say why.
"""

from __future__ import annotations

import os
from collections import defaultdict
from typing import Any

import pytest

BUDGETS = {
    "tests/experiments/test_quick": ("quick experiments", 50),
    "tests/experiments": ("experiments", 60),
    "tests/runs/test_kills.py": ("random kills", 60),
    "tests/runs": ("runs", 195),
    "tests/figures/test_report": ("browser", 80),
    "tests/figures": ("figures", 35),
    "tests/properties": ("properties", 25),
    "tests/testing": ("planted models", 60),
    "tests/models": ("models", 200),
    "tests/measures": ("measures", 205),
}
"""By beginning of the path: the first that fits."""

LONGEST = (
    "tests/experiments/test_quick",
    "tests/figures/test_report",
    "tests/measures/test_attention_edits.py",
    "tests/measures/test_no_waiting.py",
    "tests/measures/test_sweep.py",
    "tests/models/test_families.py",
    "tests/models/test_remote.py",
    "tests/models/test_sharded.py",
    "tests/models/test_state.py",
    "tests/results/test_units.py",
    "tests/runs/test_demo.py",
    "tests/runs/test_kills.py",
    "tests/runs/test_plan.py",
    "tests/runs/test_ray.py",
    "tests/runs/test_run.py",
    "tests/runs/test_s3.py",
    "tests/test_bad_commands.py",
    "tests/test_cli.py",
    "tests/test_docs.py",
    "tests/testing/",
)
"""Files that take a quarter of a minute or more."""

REST = ("everything else", 190)

PROCESSOR = ("processor time", 900)


class Budget:
    """Sums what tests take, and prints it."""

    def __init__(self) -> None:
        self.took: dict[str, float] = defaultdict(float)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        path = report.location[0].replace("\\", "/")
        part = next((x for x in BUDGETS if path.startswith(x)), None)
        self.took[BUDGETS[part][0] if part else REST[0]] += report.duration

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        if sum(self.took.values()) < 300:  # a part of the tests
            return
        terminalreporter.section("time by part, of its budget (seconds of all workers)")
        for name, budget in [*BUDGETS.values(), REST]:
            over = "  OVER" if self.took[name] > budget else ""
            terminalreporter.line(f"{name:20s} {self.took[name]:6.0f} of {budget}{over}")
        name, budget = PROCESSOR
        seconds = sum(os.times()[:4])  # this process, and those that it started and that have ended
        over = "  OVER" if seconds > budget else ""
        terminalreporter.line(f"{name:20s} {seconds:6.0f} of {budget}{over}")
