"""How features gather: swapped texts, shares of the way, and each verdict."""

from __future__ import annotations

import importlib

import numpy as np
import pytest
import xarray as xr
from tiny import THREE, TWO, tiny

import twotower as tt


@pytest.fixture(scope="module")
def module():
    return importlib.import_module("experiments.feature_gathering")


@pytest.mark.parametrize("task", [TWO, THREE])
def test_texts_change_sides_and_labels_stay(module, task: tt.Task) -> None:
    prompts = tt.build_prompts(tiny("gpt2"), task, shots=2, n=4, seed=1)
    swapped = module.swap_texts(prompts)
    assert swapped.gold.tolist() == prompts.gold.tolist()
    for mine, other in zip(prompts, swapped, strict=True):
        assert mine.texts == other.texts
        assert mine.text == other.text
        before = {s.demonstration: s for s in mine.segments if s.role == "text"}
        after = {s.demonstration: s for s in other.segments if s.role == "text"}
        for number, s in after.items():
            assert s.label == before[number].label
            assert s.text in task.texts[s.demonstration_class]
            assert s.demonstration_class != before[number].demonstration_class
        labels = [[s.text for s in p.segments if s.role == "label"] for p in (mine, other)]
        assert labels[0] == labels[1]
    for i in range(len(prompts)):
        rows = [p.label_text[i][p.role[i] == "label"].tolist() for p in (prompts, swapped)]
        assert rows[0] == rows[1]


def run(early: float, late: float, cut_early: float, cut_late: float, n: int = 40) -> xr.DataTree:
    """A run in which clean prompts have margin 2, donors -2, and windows lose what is given."""
    rng = np.random.default_rng(0)
    names = [f"{i}-{i}" for i in range(6)]
    edits = ["text to label cut", "query to last cut", "label positions patched", "last patched"]
    lost = np.zeros((n, 6, 4))
    lost[:, :3, 2], lost[:, 3:, 2] = early, late
    lost[:, :3, 1], lost[:, 3:, 1] = cut_early, cut_late
    lost += 0.1 * rng.normal(size=lost.shape)
    plain = np.tile([2.0, -2.0, -2.0], (n, 1))
    margins = xr.Dataset(
        {
            "edited": (("prompt", "window", "edit"), plain[:, :1, None] - lost),
            "plain": (("prompt", "run"), plain),
        },
        {"window": names, "edit": edits, "run": ["as it was", "texts swapped", "query replaced"]},
    )
    attention = xr.Dataset(
        {
            "attention": (
                ("prompt", "layer", "demonstration"),
                np.tile([0.3, 0.2, 0.1, 0.1], (n, 6, 1)),
            )
        }
    )
    return xr.DataTree.from_dict({"margins": margins, "by_demonstration": attention})


@pytest.mark.parametrize(
    ("lost", "verdict"),
    [
        ((0.5, 0.1, 0.6, 0.2), "supported"),
        ((0.1, 0.5, 0.6, 0.2), "not supported"),
        ((0.5, 0.1, 0.2, 0.6), "not supported"),
        ((0.3, 0.3, 0.6, 0.2), "undecided"),
    ],
)
def test_verdicts(module, lost, verdict: str) -> None:
    found = module.judge([run(*lost)] * 3)
    assert found.verdict == verdict


def test_a_seed_on_the_other_side_leaves_it_undecided(module) -> None:
    runs = [run(0.9, 0.1, 0.6, 0.2), run(0.9, 0.1, 0.6, 0.2), run(0.2, 0.25, 0.6, 0.2)]
    assert module.judge(runs).verdict == "undecided"


def test_numbers(module) -> None:
    numbers = module.judge([run(0.4, 0.2, 0.6, 0.2)] * 3).numbers
    way = numbers["way to the donor, label positions patched in layers 0-0"]
    assert way.value == pytest.approx(0.1, abs=0.01)  # 0.4 of 4
    assert way.n == 120
    near = numbers["attention to the nearer half of the labels less the farther, deep third"]
    assert near.value == pytest.approx(0.3)
