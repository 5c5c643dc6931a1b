"""Three kinds of heads: the rule's verdicts, the choice without the others, overlap."""

from __future__ import annotations

import importlib

import numpy as np
import pytest
import xarray as xr

PART = importlib.import_module("experiments.three_kinds_of_heads")
EXPERIMENT = PART.EXPERIMENT
N = 20
TASKS = {"labels": "classification", "labels 2": "classification", "pairs": "pairs"}
EVERY = {PART.NOTHING: 1.0, PART.alone("in-context"): 0.2}


def rate(share: float) -> np.ndarray:
    return (np.arange(N) < round(share * N)).astype(float)


def run(
    left: dict[str, float] = EVERY, common: int = 3, fit: float = 0.9, forms: dict = TASKS
) -> xr.DataTree:
    """Accuracies that conditions leave, and so many in-context heads that are induction heads."""
    values = np.array([[rate(left.get(one, 0.8)) for one in PART.CONDITIONS] for _ in forms])
    answers = xr.Dataset(
        {name: (("task", "condition", "prompt"), values) for name in PART.ACCURACIES}
        | {
            "correct_fit": (("task", "fit_prompt"), np.tile(rate(fit), (len(forms), 1))),
            "n_classes": ("task", np.full(len(forms), 2)),
            "form": ("task", list(forms.values())),
        },
        {"task": list(forms), "condition": list(PART.CONDITIONS)},
    )
    numbers = np.full((len(forms), 6, PART.K, 2), -1)
    numbers[..., 0] = np.arange(6)[:, None]
    numbers[..., 1] = np.arange(PART.K)
    numbers[:, 1, :common] = numbers[:, 0, :common]
    sets = [name(kind) for name in (PART.whole, PART.alone) for kind in PART.KINDS]
    heads = xr.Dataset(
        {"number": (("task", "set", "rank", "part"), numbers)}, {"task": list(forms), "set": sets}
    )
    scores = np.random.default_rng(0).standard_normal((len(forms), 3, 6, PART.K))
    scores[:, 1] = scores[:, 0]
    table = xr.Dataset(
        {"score": (("task", "kind", "layer", "head"), scores)},
        {"task": list(forms), "kind": list(PART.KINDS)},
    )
    return xr.DataTree.from_dict({"answers": answers, "heads": heads, "scores": table})


@pytest.mark.parametrize(
    ("given", "verdict"),
    [
        ({}, "supported"),
        ({"common": 6}, "not supported"),
        ({"left": EVERY | {PART.alone("induction"): 0.0}}, "not supported"),
        ({"left": EVERY | {PART.alone("function vector"): 0.2}}, "undecided"),
        ({"fit": 0.5}, "undecided"),
        ({"forms": {"labels": "classification"}}, "undecided"),
    ],
)
def test_verdicts(given: dict, verdict: str) -> None:
    judgement = EXPERIMENT.judge([run(**given)] * 3)
    assert judgement.verdict == verdict, judgement.reason


def test_numbers() -> None:
    judgement = EXPERIMENT.judge([run()] * 3)
    numbers = judgement.numbers
    assert numbers["pairs: of 12 heads in common, in-context and induction"] == 3
    assert numbers["pairs: of 12 in-context heads, of another kind"] == 3
    assert numbers["pairs: rank correlation, in-context and induction"] == pytest.approx(1)
    assert numbers["pairs: mean layer, function vector heads"] == 2
    name = "classification: accuracy over the vocabulary lost by in-context heads of no other kind"
    lost = numbers[f"{name}, beyond random heads of the same layers"]
    assert (lost.value, lost.n) == (pytest.approx(0.6), 2 * 3 * N)
    (table,) = judgement.tables.values()
    assert [row[0] for row in table["rows"]] == list(PART.CONDITIONS)
    assert {len(row) for row in table["rows"]} == {len(table["columns"])}


def test_each_kind_without_the_others() -> None:
    scores = np.zeros((3, 60))
    scores[0] = -np.arange(60)  # heads 0 to 11, then on
    scores[1] = -np.abs(np.arange(60) - 10)  # around head 10
    scores[2] = np.arange(60)
    named = {
        kind: xr.DataArray(
            own.reshape(5, 12), {"layer": range(5), "head": range(12)}, ("layer", "head")
        )
        for kind, own in zip(PART.KINDS, scores, strict=True)
    }
    chosen = {
        words: {head.layer * 12 + head.head for head in heads}
        for words, heads in PART.choose(named).items()
    }
    assert chosen["in-context heads"] == set(range(12))
    around = chosen["induction heads"]
    assert around >= set(range(5, 16))
    alone = chosen["in-context heads of no other kind"]
    assert len(alone) == 12
    assert not alone & around
    assert alone == set(sorted(set(range(60)) - around)[:12])
    assert not chosen["induction heads of no other kind"] & set(range(12))
    assert chosen["function vector heads of no other kind"] == set(range(48, 60))
