"""How many heads: the rule's verdicts, and sets kept and knocked out, by hand."""

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

PART = importlib.import_module("experiments.how_many_heads")
EXPERIMENT = PART.EXPERIMENT
N = 40
BEFORE = 0.9


def margins(share: float) -> np.ndarray:
    """(N,) margins of which a share is above 0."""
    return np.where(np.arange(N) < round(share * N), 1.0, -1.0)


def run(needed: int, enough: int, broken: int | None = None) -> xr.DataTree:
    """A run in which so many heads are needed, and enough; at random three times as many."""
    groups = {}
    for (what, where), sizes in PART.SIZES.items():
        kinds = (PART.EFFECT, PART.GREEDY, PART.RANDOM, PART.BEST)
        values = np.full((len(kinds), len(sizes), N), np.nan)
        for row, kind in enumerate(kinds[:3]):
            factor = 3 if kind == PART.RANDOM else 1
            for column, k in enumerate(sizes):
                if what == PART.KNOCKED:
                    share = 0.5 if k >= factor * needed and k != broken else BEFORE
                else:
                    share = BEFORE if k >= factor * enough else 0.5
                values[row, column] = margins(share)
        groups[PART.group_of(what, where)] = xr.Dataset(
            {
                "margin": (("kind", "size", "prompt"), values),
                "margin_before": ("prompt", margins(BEFORE)),
            },
            {"kind": list(kinds), "size": list(sizes), "prompt": np.arange(N)},
        )
    every = [[layer, head] for layer in range(30) for head in range(9)]
    heads = xr.Dataset(
        {"number": (("kind", "rank", "part"), np.array([every]))},
        {"kind": [PART.EFFECT], "rank": np.arange(270), "part": ["layer", "head"]},
    )
    root = xr.Dataset(attrs={"labels": json.dumps(["foo", "bar"])})
    return xr.DataTree.from_dict({"/": root, **groups, "heads": heads})


@pytest.mark.parametrize(
    ("needed", "enough", "broken", "verdict"),
    [
        (8, 12, None, "supported"),
        (8, 16, None, "undecided"),
        (8, 32, None, "not supported"),
        (48, 4, None, "not supported"),
        (999, 4, None, "not supported"),
        # With 24 heads the task is done again: only from 32 on is it settled.
        (8, 12, 24, "not supported"),
    ],
)
def test_verdicts(needed: int, enough: int, broken: int | None, verdict: str) -> None:
    judgement = EXPERIMENT.judge([run(needed, enough, broken)] * 3)
    assert judgement.verdict == verdict, judgement.reason


def test_numbers() -> None:
    numbers = EXPERIMENT.judge([run(8, 12)] * 3).numbers
    assert numbers["heads needed, last position, effect"] == 8
    assert numbers["heads enough, last position, greedy"] == 12
    assert numbers["heads needed, last position, random"] == 24
    assert numbers["heads enough, last position, random"] == 48
    assert numbers["heads of the model"] == 270
    left = numbers["accuracy, 8 heads knocked out, last position, effect"]
    assert (left.value, left.n) == (0.5, 3 * N)


def test_changed_heads() -> None:
    every = [tt.Head(layer, head) for layer in range(2) for head in range(2)]
    assert PART.changed_heads(every, [(1, 0)], PART.KNOCKED) == ((1, 0),)
    assert PART.changed_heads(every, [(1, 0)], PART.KEPT) == ((0, 0), (0, 1), (1, 1))


@pytest.mark.parametrize("where", ["last", "all"])
@pytest.mark.parametrize("what", ["knocked out", "kept alone"])
def test_edited(what: str, where: str) -> None:
    """Margins equal those of predictions with the same heads edited, one set at a time."""
    model = tiny("llama-grouped")
    prompts = tt.build_prompts(model, TWO, shots=2, n=4, seed=0)
    fit = tt.build_prompts(model, TWO, shots=2, n=6, seed=1)
    setting = SimpleNamespace(model=model, fit=fit, stage=lambda title: nullcontext())
    chosen = [tt.Head(0, 1), tt.Head(2, 3)]
    sets = {("effect", 2): chosen, ("greedy", 2): chosen[::-1], ("effect", 1): chosen[:1]}
    drops = PART.edited(setting, prompts, sets, what, where)
    clean = tt.predict(model, prompts)["margin"].values
    for name, heads in sets.items():
        if what == "knocked out":
            edit = tt.KnockOut(heads, where)
        else:
            others = [head for head in model.heads if head not in heads]
            edit = tt.KnockOut(others, where, to=tt.Mean(fit))
        expected = tt.predict(model, prompts, [edit])["margin"].values
        assert np.allclose(clean - drops[name], expected, atol=1e-3)
    assert np.abs(drops["effect", 2]).max() > 1e-2
