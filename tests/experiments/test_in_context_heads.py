"""In-context heads: the rule's verdicts, and the choices of heads by hand."""

from __future__ import annotations

import importlib
import json
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import xarray as xr
from tiny import TWO, tiny

import twotower as tt
from twotower.measures.choose import strongest

PART = importlib.import_module("experiments.in_context_heads")
EXPERIMENT = PART.EXPERIMENT
N = 40


def rate(share: float) -> np.ndarray:
    """(N,) answers of which a share is right."""
    return (np.arange(N) < round(share * N)).astype(float)


def run(own: float, random: float, matched: float, before: float = 0.9) -> xr.DataTree:
    """A run in which knock-outs leave these accuracies, whatever the number of heads."""
    choices = [*PART.CHOICES, PART.RANDOM, PART.MATCHED]
    left = {PART.RANDOM: random, PART.MATCHED: matched}
    values = np.array([[rate(left.get(c, own)) for _ in PART.SIZES] for c in choices])
    dims = ("choice", "size", "prompt")
    coordinates = {"choice": choices, "size": list(PART.SIZES), "prompt": np.arange(N)}
    answers = xr.Dataset(
        {name: (dims, values) for name in PART.ACCURACIES}
        | {f"{name}_before": ("prompt", rate(before)) for name in PART.ACCURACIES}
        | {"n_heads": (dims[:2], np.full(values.shape[:2], 11))},
        coordinates,
    )
    numbers = np.array([[[layer, 0] for layer in range(24)] for _ in PART.CHOICES])
    numbers[1, :, 1] = np.arange(24) >= 3  # shares its first three heads with the others
    heads = xr.Dataset(
        {"number": (("kind", "rank", "part"), numbers)},
        {"kind": list(PART.CHOICES), "rank": np.arange(24), "part": ["layer", "head"]},
    )
    effects = xr.Dataset({"margin_drop": (("prompt", "layer", "head"), np.zeros((1, 24, 3)))})
    root = xr.Dataset(attrs={"labels": json.dumps(["foo", "bar"])})
    return xr.DataTree.from_dict(
        {"/": root, "answers": answers, "heads": heads, "effects": effects}
    )


@pytest.mark.parametrize(
    ("accuracies", "verdict"),
    [
        ([(0.5, 0.85, 0.8)] * 3, "supported"),
        # More than half of what is above chance is left, though random heads cost less.
        ([(0.8, 0.9, 0.9)] * 3, "not supported"),
        # Heads of the same layers cost more.
        ([(0.5, 0.85, 0.3)] * 3, "not supported"),
        # One seed goes the other way.
        ([(0.4, 0.85, 0.8), (0.4, 0.85, 0.8), (0.5, 0.85, 0.475)], "undecided"),
        # About as much as random heads of the same layers.
        ([(0.5, 0.85, 0.5)] * 3, "undecided"),
    ],
)
def test_verdicts(accuracies: list[tuple[float, ...]], verdict: str) -> None:
    judgement = EXPERIMENT.judge([run(*row) for row in accuracies])
    assert judgement.verdict == verdict, judgement.reason


def test_numbers() -> None:
    numbers = EXPERIMENT.judge([run(0.5, 0.85, 0.8)] * 3).numbers
    left = numbers["accuracy over the vocabulary, 12 heads knocked out: random heads"]
    assert (left.value, left.n) == (pytest.approx(0.85), 3 * N)
    assert numbers["heads of the model"] == 72
    assert numbers["random heads, same layers: heads in fact knocked out, of 12"] == 11
    assert numbers["of 12 heads in common: knock-out and knock-out by label"] == 3
    assert numbers["of 12 heads in common: causal tracing and gradient"] == 12
    lost = numbers["accuracy lost between the labels, beyond random heads"]
    assert lost.value == pytest.approx(0.35)
    half = numbers["accuracy lost between the labels, beyond half of what is above chance"]
    assert half.value == pytest.approx(0.7 - 0.5)


def test_few_numbers_of_heads() -> None:
    """What was not measured is neither told nor drawn."""
    one = run(0.5, 0.85, 0.8)
    for measure in PART.ACCURACIES:
        column = one["answers"][measure]
        one["answers"][measure] = column.where(column["size"].isin(PART.FEW))
    numbers = EXPERIMENT.judge([one] * 3).numbers
    assert "accuracy between the labels, 4 heads knocked out: knock-out" in numbers
    assert "accuracy between the labels, 8 heads knocked out: knock-out" not in numbers
    figure = EXPERIMENT.draw([one] * 3, EXPERIMENT.judge([one] * 3))
    assert list(figure.axes[0].lines[0].get_xdata()) == [0, 3, 5, 6]


def test_labels_take_turns() -> None:
    """Two labels whose first heads differ, and whose second is the same."""
    drop = np.zeros((2, 1, 4, 2))
    drop[0, 0, :, 0] = [4, 3, 2, 1]  # foo is right in prompt 0
    drop[1, 0, :, 1] = [2, 3, 1, 4]  # bar in prompt 1
    drop[0, 0, :, 1] = [9, -9, 9, -9]  # not looked at
    effects = xr.Dataset(
        {
            "margin_drop": (("prompt", "layer", "head"), drop.sum(-1)),
            "logprob_drop": (("prompt", "layer", "head", "label"), drop),
        },
        {
            "prompt": [0, 1],
            "layer": [0],
            "head": np.arange(4),
            "label": ["foo", "bar"],
            "gold": ("prompt", ["foo", "bar"]),
        },
    )
    selection = xr.DataTree.from_dict({"effects": effects})
    chosen = [head.head for head in PART.by_label(selection, 3)]
    assert chosen == [0, 3, 1]
    assert [head.head for head in PART.by_label(selection, 4)] == [0, 3, 1, 2]


def test_strongest() -> None:
    values = xr.DataArray(
        np.array([[[1.0, 5.0], [2.0, 0.0]], [[1.0, -5.0], [2.0, 3.0]]]),
        dims=("prompt", "layer", "head"),
    )
    # Means: 1, 0; 2, 1.5.
    assert strongest(values.mean("prompt"), 3) == [(1, 0), (1, 1), (0, 0)]


def test_heads_in_turn() -> None:
    """Prompt i meets draw i modulo their number."""
    model = tiny("llama-grouped")
    prompts = tt.build_prompts(model, TWO, shots=2, n=5, seed=0)
    setting = SimpleNamespace(model=model, stage=lambda title: nullcontext())
    draws = [[tt.Head(0, 1), tt.Head(2, 3)], [tt.Head(1, 0)]]
    found = PART.common.knock_out_in_turn(setting, prompts, draws, "")
    each = [
        tt.predict(model, prompts, [tt.KnockOut(heads, positions="all")])["margin"].values
        for heads in draws
    ]
    expected = [each[i % 2][i] for i in range(5)]
    assert np.allclose(found["margin"], expected, atol=1e-4)
    clean = PART.common.knock_out_in_turn(setting, prompts, [[]], "")
    assert np.allclose(clean["margin"], tt.predict(model, prompts)["margin"], atol=1e-4)
    assert not np.allclose(clean["margin"], found["margin"], atol=1e-2)
