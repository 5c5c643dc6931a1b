"""A browser for the report; where there is none, its tests are skipped, and that is said."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from typing import Any

import pytest
from playwright.sync_api import Browser, Error, sync_playwright

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
MISSING: list[str] = []


def find_browser() -> str | None:
    """Where Chromium is, if playwright has none of its own."""
    named = os.environ.get("TWOTOWER_CHROMIUM")
    return named or next(filter(None, map(shutil.which, NAMES)), None)


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        try:
            found = playwright.chromium.launch(
                executable_path=find_browser(), args=["--no-sandbox"]
            )
        except Error as error:
            MISSING.append(str(error).splitlines()[0])
            pytest.skip("there is no Chromium")
        yield found
        found.close()


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if MISSING:
        terminalreporter.section("THE REPORT WAS NOT TESTED", sep="!", red=True)
        terminalreporter.line(f"There is no Chromium ({MISSING[0]}).")
        terminalreporter.line(
            "Install it (apt-get install chromium, or playwright install chromium)"
        )
        terminalreporter.line("or name it: TWOTOWER_CHROMIUM=/path/to/chromium")
