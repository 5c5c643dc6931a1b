"""Two towers: what retrieves, what is summed, R^2 and cosines by hand; the verdict's rule."""

from __future__ import annotations

import importlib
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
from tiny import THREE, TWO

import twotower as tt
from twotower.experiments.experiment import QUICK, Setting

PART = importlib.import_module("experiments.two_towers")
EXPERIMENT = PART.EXPERIMENT


def test_retrieval_by_hand() -> None:
    scores = np.array([[[3.0, 0.0, 2.0, 2.5]], [[1.0, 2.0, 5.0, np.nan]]])
    classes = np.array([[0, 0, 1, 1], [0, 1, 1, -1]])
    # First: the best is of class 0, but the mean of class 1 is larger. Second: 1 by both.
    found = PART.retrieved(scores, classes, np.array([0, 1]))
    assert found[:, 0].tolist() == [[True, False], [True, True]]


def test_standardised_scores() -> None:
    score = np.array([[[[9.0, 1.0, 3.0]], [[9.0, 4.0, 4.0]]]])
    found = PART.standardised(score, np.array([[False, True, True]]))
    assert np.isnan(found[..., 0]).all()
    assert found[0, :, 0, 1:].tolist() == [[-1, 1], [0, 0]]


def test_label_gap_by_hand() -> None:
    weights = np.array([[[[0.5, 0.2, 0.1, np.nan]]]])
    own, at = np.array([[True, False, False, True]]), np.array([[True, True, True, False]])
    assert PART.label_gap(weights, own, at, 1).item() == pytest.approx(0.2)
    assert PART.label_gap(weights, own, at, 2).item() == pytest.approx(0.35)


def test_signed_r2() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(2, 3, 30))
    expected = [np.corrcoef(a, b)[0, 1] for a, b in zip(x, y, strict=True)]
    found = PART.signed_r2(x, y)
    np.testing.assert_allclose(found, np.multiply(expected, np.abs(expected)))
    assert PART.signed_r2(-2 * x[0] + 1, x[0]) == pytest.approx(-1)
    assert PART.signed_r2(np.ones(30), x[0]) == 0


def test_ends_of_texts_and_cosines(llama: tt.Model) -> None:
    prompts = tt.build_prompts(llama, TWO, shots=2, n=6, seed=2)
    mask = PART.ends(prompts)
    streams = tt.measures.residual.residual_streams(llama, prompts, keep=mask)
    whole = tt.measures.residual.residual_streams(llama, prompts, keep="all")["residual"].values
    for query, key in PART.COMPARED.values():
        found = PART.cosine(PART.of_role(streams, query), PART.of_role(streams, key))
        assert found.shape == (6, llama.n_layers, 4)
        for i in range(6):
            roles, numbers = prompts.role[i], prompts.demonstration[i]
            q = whole[i][:, np.flatnonzero(roles == query)[-1]]
            for d in range(4):
                k = whole[i][:, np.flatnonzero((roles == key) & (numbers == d))[-1]]
                size = np.linalg.norm(q, axis=-1) * np.linalg.norm(k, axis=-1)
                np.testing.assert_allclose(found[i, :, d], (q * k).sum(-1) / size, rtol=1e-3)


@pytest.mark.parametrize("task", [TWO, THREE])
def test_sums_over_label_positions(llama: tt.Model, task: tt.Task, tmp_path: Path) -> None:
    prompts = tt.build_prompts(llama, task, shots=2, n=4, seed=2)
    setting = Setting(llama, task, 0, QUICK, tmp_path)
    setting.__dict__["halves"] = (prompts, prompts)
    run = tt.analyze(llama, prompts, measures=("predictions", "qk", "ov"), keep="labels")
    table = PART._towers(setting, run)
    score, attention = run["qk"]["score"].values, run["qk"]["attention"].values
    logits, n_labels = run["ov"]["label_logit"].values, len(prompts.labels)
    for i, layer, head in ((0, 0, 1), (3, 2, 2)):
        own = run["qk"]["label_text"].values[i] == prompts.gold[i]
        sign = np.where(own, 1, -1 / (n_labels - 1))
        kernel = np.exp(score[i, layer, head]) / np.exp(score[i, layer, head]).sum()
        gold = np.arange(n_labels) == prompts.gold_index[i]
        one = logits[i, layer, head]
        says = one[:, gold][:, 0] - one[:, ~gold].mean(axis=1)
        expected = [
            (attention[i, layer, head] * sign).sum(),
            (kernel * sign).sum(),
            (attention[i, layer, head] * says).sum(),
        ]
        np.testing.assert_allclose(table["gap"].values[i, layer, head], expected, rtol=1e-4)
    classes = table["position_class"].values
    same = run["qk"]["demonstration_class"].values == prompts.query_class[:, None]
    assert ((classes == table["asked_class"].values[:, None]) == same).all()
    np.testing.assert_allclose(table["score"].mean("position"), 0, atol=1e-5)
    np.testing.assert_allclose(table["score"].std("position"), 1, rtol=1e-4)


def made_up(seed: int, finds: float, explains: float, cosine: float = 0.7) -> xr.DataTree:
    """A run in which heads 0.0 and 0.1 write; `finds` is how often they find the class."""
    rng = np.random.default_rng(seed)
    n, classes = 40, np.tile([0, 0, 1, 1], (40, 1))
    asked = rng.integers(0, 2, n)
    score = rng.normal(size=(n, 6, 5, 4))
    found = np.where(np.arange(n) < finds * n, asked, 1 - asked)
    score[:, 0, :2] += 20 * (classes == found[:, None])[:, None]
    margin = rng.normal(size=n)
    gap = rng.normal(size=(n, 6, 5, 3))
    gap[:, 0, :2] += explains * margin[:, None, None]
    right = np.zeros((n, 2, 2, 6, 2), dtype=bool)
    right[: int(cosine * n), :, 1, 3] = True
    dims = ("prompt", "compared", "centred", "layer", "rule")
    coordinates = {
        "compared": ["label", "text"],
        "centred": [0, 1],
        "layer": np.arange(6),
        "rule": ["nearest", "mean"],
    }
    of_heads = ("prompt", "layer", "head")
    heads = [[[0, 0], [0, 1]], [[1, 0], [1, 1]]]
    tree = xr.DataTree.from_dict(
        {
            "towers": xr.Dataset(
                {
                    "score": ((*of_heads, "position"), score),
                    "position_class": (("prompt", "position"), classes),
                    "asked_class": ("prompt", asked),
                    "gap": ((*of_heads, "weight"), gap),
                    "margin": ("prompt", margin),
                    "correct": ("prompt", margin > 0),
                },
                {"weight": list(PART.WEIGHTS)},
            ),
            "cosine": xr.Dataset({"correct": (dims, right)}, coordinates),
            "cosine_fit": xr.Dataset({"correct": (dims, right)}, coordinates),
            "heads": xr.Dataset(
                {"number": (("kind", "rank", "part"), heads)}, {"kind": ["writers", "in_context"]}
            ),
        }
    )
    tree.attrs["seed"] = seed
    return tree


@pytest.mark.parametrize(
    ("about", "verdict"),
    [
        ({"finds": 0.95, "explains": 3.0}, "supported"),
        ({"finds": 0.95, "explains": 0.0}, "undecided"),
        ({"finds": 0.55, "explains": 3.0}, "undecided"),
        ({"finds": 0.8, "explains": 3.0, "cosine": 1.0}, "undecided"),
        ({"finds": 0.2, "explains": 3.0}, "not supported"),
        ({"finds": 0.95, "explains": -3.0}, "not supported"),
    ],
)
def test_verdicts(about: dict[str, float], verdict: str) -> None:
    judgement = EXPERIMENT.judge([made_up(seed, **about) for seed in range(3)])
    assert judgement.verdict == verdict, judgement.reason
    numbers = judgement.numbers
    found = numbers["retrieval by summed scores, nearest, heads that write"]
    assert found.value == pytest.approx(about["finds"])
    assert found.n == 120
    cosine = numbers["retrieval by cosine of last and label positions, nearest"]
    assert cosine.value == pytest.approx(about.get("cosine", 0.7))
    chosen = numbers["layers chosen for cosine of last and label positions, nearest"]
    assert chosen == "3 (centred), 3 (centred), 3 (centred)"
