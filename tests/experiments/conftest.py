"""Intervals of made-up runs, from fewer bootstrap samples than those that are published."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from twotower import statistics


@pytest.fixture(scope="module", autouse=True)
def _few_samples() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for function in (statistics.bootstrap, statistics.bootstrap_mean):
            assert function.__defaults__ == (0, 2000)
            patch.setattr(function, "__defaults__", (0, 400))
        yield
