"""The command line, run in the tests' own process."""

from __future__ import annotations

from pathlib import Path

from twotower.cli import main


def run(*arguments: str | Path) -> int:
    """Exit code of the command line."""
    try:
        main([str(x) for x in arguments])
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0
