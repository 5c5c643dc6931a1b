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


LAYERS, HEADS = 6, 2
TARGETS = ("4.0", "5.1")


def run(keys: tuple[float, float], queries: tuple[float, float], n: int = 40) -> xr.DataTree:
    """A run whose heads lose so much QK AUC by each layer of the lower and the upper half."""
    rng = np.random.default_rng(0)
    names = [f"layer {i}" for i in range(LAYERS)]
    names += [f"{i}.{j}" for i in range(LAYERS) for j in range(HEADS)]
    names += [*(f"mlp {i}" for i in range(LAYERS)), "embedding"]
    drops = np.full((n, len(names), len(TARGETS), 2), np.nan)
    for target, layer in enumerate((4, 5)):
        for tower, (lower, upper) in enumerate((keys, queries)):
            own = drops[:, :layer, target, tower]
            own[:] = 0
            own[:, :2], own[:, layer - 2 :] = lower, upper
            own += 0.001 * rng.normal(size=own.shape)
    drops[:, names.index("3.1"), :, 0] = 0.2
    share = np.full((n, LAYERS, HEADS, 1), 0.3)
    along = ("prompt", "layer", "head", "source")
    shares = xr.Dataset({"share": (along, share)}, {"source": ["own text"]})
    shares = shares.assign_coords(layer=np.arange(LAYERS), head=np.arange(HEADS))
    table = xr.Dataset(
        {
            "qk_auc_drop": (("prompt", "source", "target", "tower"), drops),
            "qk_auc": (("prompt", "target"), np.full((n, len(TARGETS)), 0.9)),
            "margin_drop": (
                ("prompt", "sources_layer", "target", "tower"),
                drops[:, :LAYERS],
            ),
        },
        {
            "source": names,
            "target": list(TARGETS),
            "tower": ["k", "q"],
            "sources_layer": np.arange(LAYERS),
        },
    )
    values = np.tile(np.array([[0.8], [0.1]]), (4, 1, 2))
    planted = xr.Dataset({"qk_auc_drop": (("architecture", "source", "tower"), values)})
    datasets = {"drops": table, "label_shares": shares, "last_shares": shares, "planted": planted}
    return xr.DataTree.from_dict(datasets)


@pytest.mark.parametrize(
    ("keys", "queries", "verdict"),
    [
        ((0.2, 0.1), (0.2, 0.1), "supported"),
        ((0.1, 0.2), (0.2, 0.1), "not supported"),
        ((0.2, 0.1), (0.1, 0.2), "not supported"),
        ((0.1, 0.1), (0.2, 0.1), "undecided"),
    ],
)
def test_verdicts(module, keys, queries, verdict: str) -> None:
    found = module.judge([run(keys, queries)] * 3)
    assert found.verdict == verdict


def test_a_seed_on_the_other_side_leaves_it_undecided(module) -> None:
    runs = [run((0.3, 0.1), (0.2, 0.1))] * 2 + [run((0.1, 0.11), (0.2, 0.1))]
    assert module.judge(runs).verdict == "undecided"


def test_a_method_that_misses_planted_heads_decides_nothing(module) -> None:
    runs = [run((0.2, 0.1), (0.2, 0.1)) for _ in range(3)]
    runs[1]["planted"]["qk_auc_drop"][2, 1, 0] = 0.9  # another head is stronger, through the keys
    found = module.judge(runs)
    assert found.verdict == "undecided"
    assert "11 of 12 planted models" in found.reason


def test_numbers(module) -> None:
    found = module.judge([run((0.2, 0.1), (0.0, 0.0))] * 3)
    lower = found.numbers["drop of the QK AUC, keys, lower half"]
    assert lower.value == pytest.approx(0.4, abs=0.01)  # two layers of 0.2
    assert lower.n == 120
    shallow = found.numbers["drop of the QK AUC, keys, heads of layers 0-0"]
    assert shallow.value == pytest.approx(0.2, abs=0.01)
    whole = found.numbers["drop of the QK AUC, if everything were the donor's"]
    assert whole.value == pytest.approx(0.8)  # from 0.9 to 0.1
    table = found.tables["Heads that feed keys"]
    assert table["rows"][0][0] == "3.1"
    assert table["rows"][0][2].value == pytest.approx(0.3)
