"""Heads against the answer: the rule's verdicts, gains, and who the heads are."""

from __future__ import annotations

import importlib

import numpy as np
import pytest
import xarray as xr

PART = importlib.import_module("experiments.heads_against_the_answer")
EXPERIMENT = PART.EXPERIMENT
N, LAYERS, HEADS = 20, 6, 5
TASKS = ["one", "two", "three", "four"]


def rate(share: float) -> np.ndarray:
    return (np.arange(N) < round(share * N)).astype(float)


def run(
    without: float = 0.95, random: float = 0.6, gains: tuple = (1, 1, 1, 1), fit: float = 0.9
) -> xr.DataTree:
    """Accuracies without the heads and without random ones, and gains of the margin by task."""
    shape = (len(TASKS), len(PART.CONDITIONS), N)
    right, margin = np.zeros(shape), np.zeros(shape)
    right[:] = rate(0.7)
    right[:, 1], right[:, 2] = rate(without), rate(random)
    margin[:, 1] = np.array(gains)[:, None]
    dims = ("task", "condition", "prompt")
    answers = xr.Dataset(
        {
            "margin": (dims, margin),
            "correct": (dims, right),
            "top1_correct": (dims, right),
            "correct_fit": (("task", "fit_prompt"), np.tile(rate(fit), (len(TASKS), 1))),
            "n_classes": ("task", np.full(len(TASKS), 2)),
        },
        {"task": TASKS, "condition": list(PART.CONDITIONS)},
    )
    number = np.stack(np.divmod(np.arange(2 * PART.K), HEADS), axis=-1)
    number = np.tile(number.reshape(1, 2, PART.K, 2), (len(TASKS), 1, 1, 1))
    number[:, 1, 0] = number[:, 0, 0]  # one head of both sets
    heads = xr.Dataset(
        {"number": (("task", "set", "rank", "part"), number)},
        {"task": TASKS, "set": list(PART.SETS.values())},
    )
    drop = np.ones((len(TASKS), LAYERS, HEADS))
    drop[:, 0, :4] = -1
    again = drop.copy()
    again[3] = np.nan  # a classic
    names = np.full((LAYERS, HEADS), "", dtype=object)
    names[0, :3] = "suppressor, sink"
    of_heads = ("task", "layer", "head")
    scores = xr.Dataset(
        {
            "margin_drop": (of_heads, drop),
            "margin_drop_again": (of_heads, again),
            "answer_logit": (of_heads, drop),
        },
        {"task": TASKS},
    )
    kinds = xr.Dataset({"kind": (("layer", "head"), names.astype(np.dtypes.StringDType()))})
    return xr.DataTree.from_dict(
        {"answers": answers, "heads": heads, "scores": scores, "kinds": kinds}
    )


@pytest.mark.parametrize(
    ("given", "verdict"),
    [
        ({}, "supported"),
        ({"gains": (1, 1, 1, -0.1)}, "supported"),  # three quarters
        ({"gains": (2, 2, -0.1, -0.1)}, "undecided"),
        ({"gains": (9, -0.1, -0.1, -0.1)}, "not supported"),
        ({"gains": (-1, -1, -1, -1)}, "not supported"),
        ({"without": 0.7, "random": 0.7}, "undecided"),
        ({"without": 0.4}, "not supported"),
        ({"fit": 0.5}, "undecided"),
    ],
)
def test_verdicts(given: dict, verdict: str) -> None:
    judgement = EXPERIMENT.judge([run(**given)] * 3)
    assert judgement.verdict == verdict, judgement.reason


def test_numbers() -> None:
    judgement = EXPERIMENT.judge([run()] * 3)
    numbers = judgement.numbers
    beyond = numbers[f"margin gained, without {PART.AGAINST}, beyond random heads"]
    assert (beyond.value, beyond.n) == (1, 4 * 3 * N)
    assert numbers["of 12 heads against the answer, against it on other prompts"] == 4
    assert numbers["of 12 heads against the answer, write against it"] == 4
    assert numbers["of 12 heads against the answer, among the 12 that write most against it"] == 1
    assert numbers["of 12 heads against the answer, in common for two questions"] == 12
    often = numbers["heads against the answer in most questions and seeds"]
    assert often.startswith("0.0 (12 of 12; sink, suppressor); ")
    gained, kinds = judgement.tables.values()
    assert [row[0] for row in gained["rows"]] == TASKS
    assert {len(row) for row in gained["rows"]} == {len(gained["columns"])}
    rows = {row[0]: row[1:] for row in kinds["rows"]}
    assert rows["suppressor"] == [pytest.approx(0.1), 0.25, pytest.approx(1 / 12)]


def test_lowest() -> None:
    values = np.arange(30.0).reshape(LAYERS, HEADS)
    assert PART.lowest(values)[:2] == [(0, 0), (0, 1)]
    assert len(PART.lowest(values)) == PART.K
