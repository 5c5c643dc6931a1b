"""In-context heads by task: the rule's verdicts, and which tasks count."""

from __future__ import annotations

import importlib

import numpy as np
import pytest
import xarray as xr

from twotower.experiments.experiment import FULL, QUICK

PART = importlib.import_module("experiments.heads_by_task")
EXPERIMENT = PART.EXPERIMENT
N = 20


def rate(share: float) -> np.ndarray:
    return (np.arange(N) < round(share * N)).astype(float)


def run(left: list[tuple[float, float]], fit: list[float]) -> xr.DataTree:
    """Accuracies that own and random heads leave, and accuracy on choosing prompts, by task."""
    values = np.array([[rate(0.9), rate(own), rate(random)] for own, random in left])
    answers = xr.Dataset(
        {name: (("task", "condition", "prompt"), values) for name in PART.ACCURACIES}
        | {
            "correct_fit": (("task", "prompt"), np.array([rate(share) for share in fit])),
            "n_classes": ("task", np.full(len(fit), 2)),
        },
        {
            "task": [f"task {i}" for i in range(len(fit))],
            "condition": list(PART.CONDITIONS),
            "prompt": np.arange(N),
        },
    )
    return xr.DataTree.from_dict({"answers": answers})


GOOD, EVEN, BAD = (0.4, 0.8), (0.7, 0.7), (0.9, 0.5)


@pytest.mark.parametrize(
    ("left", "fit", "verdict"),
    [
        ([GOOD] * 4, [0.9] * 4, "supported"),
        # The task that speaks against it cannot be done, and counts for nothing.
        ([GOOD, GOOD, GOOD, BAD], [0.9, 0.9, 0.9, 0.5], "supported"),
        ([GOOD, GOOD, GOOD, BAD], [0.9] * 4, "not supported"),
        ([GOOD, GOOD, GOOD, EVEN], [0.9] * 4, "undecided"),
        ([GOOD] * 4, [0.9, 0.9, 0.5, 0.5], "undecided"),
        ([GOOD] * 4, [0.5] * 4, "undecided"),
    ],
)
def test_verdicts(left: list[tuple[float, float]], fit: list[float], verdict: str) -> None:
    judgement = EXPERIMENT.judge([run(left, fit)] * 3)
    assert judgement.verdict == verdict, judgement.reason


def test_numbers() -> None:
    numbers = EXPERIMENT.judge([run([GOOD, GOOD, GOOD, BAD], [0.9, 0.9, 0.9, 0.5])] * 3).numbers
    assert numbers["tasks that the model can do"] == 3
    assert numbers["tasks that it cannot"] == "task 3"
    lost = numbers["all tasks: accuracy over the vocabulary lost beyond random heads"]
    assert (lost.value, lost.n) == (pytest.approx(0.4), 3 * 3 * N)
    assert "task 3: accuracy between the labels lost beyond random heads" not in numbers


def test_guesses() -> None:
    """27 of 60 is guessing between two; 60 of 60 is not."""
    runs = [run([GOOD, GOOD], [0.45, 1.0])] * 3
    found = PART.common.guesses(runs, "answers", "correct_fit")
    assert found["task 0"] > 0.5
    assert found["task 1"] == pytest.approx(0.5**60)


def test_some() -> None:
    names = list("abcdefg")
    assert PART.common.some(names, FULL) == names
    assert PART.common.some(names, QUICK) == ["a", "d", "g"]
