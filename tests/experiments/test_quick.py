"""Experiments in their short form, on the demo model: the first half of the suite."""

from __future__ import annotations

from pathlib import Path

import pytest
from quick import HALF, SUITE, quick_form

import twotower as tt


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("experiments")


@pytest.mark.demo_model
@pytest.mark.parametrize("name", list(SUITE)[:HALF])
def test_quick_form(demo_model: tt.Model, out: Path, name: str) -> None:
    quick_form(demo_model, out, name)
