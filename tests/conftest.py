"""Hooks of all tests; the fixtures that they share stand in `shared_fixtures`."""

from __future__ import annotations

import pytest
from budget import LONGEST, Budget


def pytest_configure(config: pytest.Config) -> None:
    worker = hasattr(config, "workerinput")  # one of xdist's
    if not worker:
        config.pluginmanager.register(Budget())
        config.option.loadscopereorder = False  # xdist would begin with files of many tests
    if worker or not config.getoption("numprocesses", None):
        config.pluginmanager.import_plugin("shared_fixtures")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first, so that no worker is left with one at the end."""
    items.sort(key=lambda item: not item.nodeid.startswith(LONGEST))
