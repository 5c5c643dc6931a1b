"""QK alone, OV alone: pairs of equal length, patches against each other; the verdict's rule."""

from __future__ import annotations

import importlib
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
from tiny import TWO

import twotower as tt
from twotower.experiments.experiment import QUICK, Setting

PART = importlib.import_module("experiments.qk_ov_alone")
EXPERIMENT = PART.EXPERIMENT
SETS = list(PART.SETS)


def test_margin_of() -> None:
    logits = np.array([[1.0, 3.0, 2.0], [5.0, 1.0, 0.0]])
    assert PART.margin_of(logits, np.array([1, 2])).tolist() == [1.0, -5.0]


def test_pairs_have_equal_lengths_and_the_same_demonstrations(llama: tt.Model) -> None:
    prompts = tt.build_prompts(llama, TWO, shots=2, n=20, seed=1)
    parts = PART.asked_otherwise(prompts, 9)
    assert sum(len(own) for own, _ in parts) == 9
    assert len({string for own, _ in parts for string in own.strings}) == 9
    for own, other in parts:
        assert (own.lengths == other.lengths).all()
        assert (own.query_class != other.query_class).all()
        inside = own.demonstration >= 0
        assert (own.token_id[inside] == other.token_id[inside]).all()
        assert (own.gold != other.gold).all()


def test_patched_margins(llama: tt.Model, tmp_path: Path) -> None:
    """Both alone equal what `predict` gives; with nothing changed nothing moves."""
    setting = Setting(llama, TWO, 0, QUICK, tmp_path)
    prompts = tt.build_prompts(llama, TWO, shots=2, n=4, seed=1)
    twin = prompts.reversed_labels()
    sets = {
        "writers": [tt.Head(1, 0), tt.Head(2, 3)],
        "random": [tt.Head(0, 2), tt.Head(2, 3)],
    }
    patched = PART._patched
    found = patched(setting, "labels", prompts, twin, sets)
    for number, heads in enumerate(sets.values()):
        edits = [tt.Patch(heads, twin, what) for what in ("attention", "values")]
        for place, given in enumerate(([edits[0]], [edits[1]], edits)):
            expected = tt.predict(llama, prompts, given)["margin"].values
            got = found["margin_patched"][:, number, place]
            np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found["margin_changed"], -tt.predict(llama, twin)["margin"].values)
    same = patched(setting, "labels", prompts, prompts, sets)
    assert np.abs(same["moved"]).max() == 0
    clean = same["margin_clean"][:, None, None]
    np.testing.assert_allclose(same["margin_patched"] - clean, 0, atol=1e-5)


def made_up(seed: int, labels: tuple[float, float], query: tuple[float, float]) -> xr.DataTree:
    """A run in which (attention, values) of the heads that write explain so much."""
    rng = np.random.default_rng(seed)
    groups = {}
    for name, (attention, values) in (("labels", labels), ("query", query)):
        clean = 2 + 0.1 * rng.normal(size=20)
        shift = 4 + 0.1 * rng.normal(size=20)
        shares = np.zeros((20, len(SETS), 3))
        shares[:, SETS.index("writers")] = (attention, values, attention + values)
        shares += 0.02 * rng.normal(size=shares.shape)
        groups[name] = xr.Dataset(
            {
                "margin_clean": ("prompt", clean),
                "margin_changed": ("prompt", clean - shift),
                "margin_patched": (
                    ("prompt", "set", "what"),
                    clean[:, None, None] - shift[:, None, None] * shares,
                ),
                "moved": (("prompt", "set"), rng.random((20, len(SETS)))),
            },
            {"set": SETS, "what": list(PART.WHATS)},
        )
    return xr.DataTree.from_dict(groups)


@pytest.mark.parametrize(
    ("labels", "query", "verdict"),
    [
        ((0.0, 0.5), (0.4, 0.0), "supported"),
        ((0.25, 0.25), (0.4, 0.0), "undecided"),
        ((-0.5, 0.5), (0.4, 0.0), "undecided"),
        ((0.5, 0.1), (0.4, 0.0), "not supported"),
        ((0.0, 0.5), (0.1, 0.4), "not supported"),
    ],
)
def test_verdicts(labels: tuple[float, float], query: tuple[float, float], verdict: str) -> None:
    judgement = EXPERIMENT.judge([made_up(seed, labels, query) for seed in range(3)])
    assert judgement.verdict == verdict, judgement.reason
    found = judgement.numbers["labels reversed: share explained by values alone, heads that write"]
    assert found.value == pytest.approx(labels[1], abs=0.02)
    assert found.n == 60


def test_every_seed_has_to_agree() -> None:
    runs = [made_up(seed, (0.0, 0.5), (0.4, 0.0)) for seed in range(2)]
    runs.append(made_up(2, (0.3, 0.2), (0.4, 0.0)))
    assert EXPERIMENT.judge(runs).verdict == "undecided"
