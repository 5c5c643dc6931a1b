"""Shared heads: the rule's verdicts, overlap, rank correlation and chance, by hand."""

from __future__ import annotations

import importlib

import numpy as np
import pytest
import xarray as xr

PART = importlib.import_module("experiments.shared_heads")
EXPERIMENT = PART.EXPERIMENT
N, LAYERS, HEADS = 20, 30, 9
TASKS = ["one", "two", "three", "four"]


def run(own: list[float], seed: int, fit: float = 0.9) -> xr.DataTree:
    """A run in which a task's effects are common ones and, by this weight, its own."""
    rng = np.random.default_rng(seed)
    common = rng.standard_normal((LAYERS, HEADS))
    drops = np.array([(1 - w) * common + w * rng.standard_normal((LAYERS, HEADS)) for w in own])
    drops = np.broadcast_to(drops[:, None, None], (len(own), 2, N, LAYERS, HEADS))
    right = (np.arange(N) < round(fit * N)).astype(float)
    tasks = TASKS[: len(own)]
    effects = xr.Dataset(
        {
            "margin_drop": (("task", "half", "prompt", "layer", "head"), drops),
            "correct": (
                ("task", "half", "prompt"),
                np.broadcast_to(right, (len(own), 2, N)),
            ),
            "n_classes": ("task", np.full(len(own), 2)),
        },
        {"task": tasks, "half": list(PART.HALVES)},
    )
    conditions = [PART.NOTHING, *tasks, PART.RANDOM]
    values = np.ones((len(own), len(conditions), N))
    for row in range(len(own)):
        values[row, 1 : 1 + len(own), : N // 4] = 0  # another task's heads cost a quarter
        values[row, 1 + row, : N // 2] = 0  # its own a half
    answers = xr.Dataset(
        {"correct": (("task", "heads_of", "prompt"), values)},
        {"task": tasks, "heads_of": conditions, "prompt": np.arange(N)},
    )
    return xr.DataTree.from_dict({"effects": effects, "answers": answers})


@pytest.mark.parametrize(
    ("own", "fit", "verdict"),
    [
        ([0.2, 0.2, 0.2], 0.9, "supported"),
        ([1, 1, 1], 0.9, "not supported"),
        # One task of four is by itself: three of six pairs fail.
        ([0.2, 0.2, 0.2, 1], 0.9, "not supported"),
        ([0.2, 0.2], 0.9, "undecided"),
        ([0.2, 0.2, 0.2], 0.5, "undecided"),
    ],
)
def test_verdicts(own: list[float], fit: float, verdict: str) -> None:
    judgement = EXPERIMENT.judge([run(own, seed, fit) for seed in range(3)])
    assert judgement.verdict == verdict, judgement.reason


def test_one_pair_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    table = np.full((3, 3), 8.0)
    table[0, 1] = table[1, 0] = 1
    monkeypatch.setattr(
        PART,
        "mean_matrix",
        lambda runs, tasks, compare: table if compare is PART.shared else np.full((3, 3), 0.9),
    )
    judgement = EXPERIMENT.judge([run([0.2] * 3, seed) for seed in range(3)])
    assert judgement.verdict == "undecided"


def test_numbers() -> None:
    numbers = EXPERIMENT.judge([run([0.2] * 3, seed) for seed in range(3)]).numbers
    assert numbers["one, two sets: of 12 heads in common"] == 12
    assert numbers["of 12 heads in common by chance, expected"] == pytest.approx(144 / 270)
    assert numbers["accuracy lost with own heads knocked out"].value == 0.5
    other = numbers["accuracy lost with another task's heads, beyond random heads"]
    assert (other.value, other.n) == (0.25, 3 * 3 * N)


def test_shared() -> None:
    one, other = np.array([5.0, 4, 3, 2, 1]), np.array([5.0, 1, 4, 2, 3])
    assert PART.shared(one, other, 2) == 1
    assert PART.shared(one, other, 3) == 2
    assert PART.rank_correlation(one, other) == pytest.approx(1 - 6 * (9 + 1 + 4) / 120)


def test_matrix_takes_one_set_of_each() -> None:
    effects = np.arange(8.0).reshape(2, 2, 2)
    table = PART.matrix(effects, lambda one, other: float(one[0] * other[0]))
    # First sets begin with 0 and 4, second with 2 and 6.
    assert table.tolist() == [[0, 4], [4, 24]]


def test_chance() -> None:
    """Effects that depend on the layer alone correlate, but not beyond depth."""
    assert PART.overlap_bound(270) == 2
    depth = np.arange(LAYERS, dtype=float)[:, None]
    dims = ("task", "half", "prompt", "layer", "head")
    drops = np.broadcast_to(depth, (2, 2, N, LAYERS, HEADS))
    effects = xr.Dataset({"margin_drop": (dims, drops)}, {"task": TASKS[:2]})
    one = xr.DataTree.from_dict({"effects": effects})
    free = PART.chance_correlation([one], TASKS[:2], within=False)
    within = PART.chance_correlation([one], TASKS[:2], within=True)
    # 1.64 deviations of 1 / sqrt(269); for a mean of two draws 1.16.
    assert 0.06 < free[0, 1] < 0.12
    assert within == pytest.approx(np.ones((2, 2)))
