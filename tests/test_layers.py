"""Imports go one way, as ARCHITECTURE.md draws it, and heavy libraries come when they are used."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def test_data_moves_to_the_right_only() -> None:
    command = [Path(sys.executable).with_name("lint-imports"), "--no-cache"]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout


def imported_by(code: str) -> set[str]:
    """Top-level packages that are there after some code, in a process of its own."""
    line = f"{code}\nimport sys; print(*{{name.partition('.')[0] for name in sys.modules}})"
    found = subprocess.run([sys.executable, "-c", line], capture_output=True, text=True, check=True)
    return set(found.stdout.splitlines()[-1].split())


HEAVY = {"torch", "nnsight", "transformers", "xarray", "zarr", "matplotlib", "ray", "scipy"}


@pytest.mark.parametrize(
    ("code", "allowed"),
    [
        ("import twotower", set()),
        ("from twotower.cli import app; app.help_print([])", set()),
        ("import twotower, xarray", {"xarray"}),
        ("import twotower.prompts", set()),
        ("from twotower import in_context_heads, two_tower_scores", set()),
        ("import twotower.figures.terminal, twotower.figures.report", set()),
    ],
)
def test_heavy_libraries_are_imported_when_used(code: str, allowed: set[str]) -> None:
    assert imported_by(code) & HEAVY <= allowed


def seconds(*arguments: str) -> float:
    """Seconds of the processor that an interpreter takes, the least of three."""
    found = []
    for _ in range(3):
        before = os.times()
        subprocess.run([sys.executable, *arguments], capture_output=True, check=True)
        after = os.times()
        found.append(sum(getattr(after, x) - getattr(before, x) for x in TIMES))
    return min(found)


TIMES = ("children_user", "children_system")


@pytest.mark.parametrize(
    ("arguments", "limit"),
    [(["-c", "import twotower"], 2), (["-m", "twotower.cli", "--help"], 5)],
)
def test_it_starts_at_once(arguments: list[str], limit: float) -> None:
    """Beside a few modules of Python's own (0.14 s here): 3 to 4 times, beside other work."""
    own = seconds("-c", "import argparse, asyncio, json, importlib.metadata")
    assert seconds(*arguments) < limit * own
