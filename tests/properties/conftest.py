"""Tiny models compute on one thread: two threads wait for each other far longer than they work."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="module", autouse=True)
def _always(one_thread: None) -> None:
    pass
