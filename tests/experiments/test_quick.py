"""Experiments in their short form: on a random model, and by `make test-all` on the demo model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from shutil import copy
from typing import Any

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


def rough(save: Callable[..., None]) -> Callable[..., None]:
    """Saving of figures, with few pixels; the second format is a copy of the first."""

    def saved(figure: Figure, path: Path, **options: Any) -> None:
        if path.suffix == ".png":
            save(figure, path, dpi=40)
        else:
            copy(path.with_suffix(".png"), path)

    return saved


def taken() -> list[Any]:
    """Experiments that need no real model; those that their own tests measure are slow."""
    slow = ("majority-bias", "recency-bias")
    listed = [name for name in SUITE if name != "circuits"]
    return [pytest.param(x, marks=pytest.mark.slow) if x in slow else x for x in listed]


@pytest.mark.demo_model
@pytest.mark.parametrize("name", taken())
def test_quick_form(
    name: str, random_model: tt.Model, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(experiment, "check_task", lambda run, name: None)
    # Nor is the small model trained that other_architectures makes.
    monkeypatch.setattr(small_models, "LESSONS", small_models.LESSONS[-1:])
    monkeypatch.setattr(small_models, "DONE", 0.0)
    monkeypatch.setitem(small_models.SETTINGS, "steps", 1)
    # Copying is tested at one position of each random sequence, not at eight.
    monkeypatch.setattr(import_module("twotower.measures.head_kinds"), "COPIED", 8)
    gathering = SUITE["feature-gathering"].measure.__globals__
    monkeypatch.setitem(gathering, "PLANTED", gathering["PLANTED"][:1])
    # One of three tasks, with the most classes; and figures of few pixels, in one format.
    more = SUITE["more-classes"].measure.__globals__
    monkeypatch.setitem(more, "TASKS", more["TASKS"][-1:])
    monkeypatch.setattr(Figure, "savefig", rough(Figure.savefig))
    quick_form(random_model, out, name, EVERY_LABEL if name == "more-classes" else FEW)


@pytest.mark.slow
@pytest.mark.demo_model
@pytest.mark.parametrize("name", SUITE)
def test_on_the_demo_model(demo_model: tt.Model, out: Path, name: str) -> None:
    quick_form(demo_model, out / "demo", name)
