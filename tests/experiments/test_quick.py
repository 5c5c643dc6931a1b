"""Experiments in their short form: on a random model, and by `make test-all` on the demo model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from matplotlib.figure import Figure
from quick import SUITE, quick_form

import twotower as tt
from twotower.experiments import experiment, small_models
from twotower.experiments.experiment import QUICK

FEW = replace(QUICK, n_fit=6, n_test=6, shots=2, n_task=4)
EVERY_LABEL = replace(FEW, n_test=12)
"""Enough prompts for each of several labels to be the right answer."""


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("experiments")


@pytest.mark.demo_model
@pytest.mark.parametrize("name", SUITE)
def test_quick_form(
    name: str, random_model: tt.Model, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(experiment, "check_task", lambda run, name: None)
    # Nor is the small model trained that other_architectures makes.
    monkeypatch.setattr(small_models, "LESSONS", small_models.LESSONS[-1:])
    monkeypatch.setattr(small_models, "DONE", 0.0)
    monkeypatch.setitem(small_models.SETTINGS, "steps", 1)
    # One of three tasks, with the most classes; and figures of few pixels.
    more = SUITE["more-classes"].measure.__globals__
    monkeypatch.setitem(more, "TASKS", more["TASKS"][-1:])
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda *a, **options: save(*a, **{**options, "dpi": 40}))
    quick_form(random_model, out, name, EVERY_LABEL if name == "more-classes" else FEW)


@pytest.mark.slow
@pytest.mark.demo_model
@pytest.mark.parametrize("name", SUITE)
def test_on_the_demo_model(demo_model: tt.Model, out: Path, name: str) -> None:
    quick_form(demo_model, out / "demo", name)
