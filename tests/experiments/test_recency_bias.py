"""Recency bias: the verdict's rule, orders of demonstrations, and correlations by hand."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import xarray as xr
from bias_runs import KINDS, mitigation, one_of_each_kind, small_setting
from tiny import THREE

import twotower as tt
from twotower.experiments.experiment import Setting
from twotower.results import make_tree, provenance, save

ORDERS = ("shuffled", "alternating", "blocks of 2", "blocks of 4")
HELPS = {"as it is": 2.0, KINDS[0]: 0.8, KINDS[1]: 1.6}
OTHERS = {"shallow heads": 1.9, "all heads": 0.2, "random heads 1": 2.0, "random heads 2": 2.1}


@pytest.fixture(scope="module")
def recency() -> ModuleType:
    return importlib.import_module("experiments.recency_bias")


def made(
    edits: Mapping[str, float],
    levels: tuple[float, ...] = (0.2, 0.0, 0.6, 2.0),
    falls: float = -0.3,
) -> list[xr.DataTree]:
    """Runs of three seeds; `falls` is the position part's correlation with distance."""
    runs = []
    for seed in range(3):
        rng = np.random.default_rng(seed)
        bias = np.array(levels) + rng.normal(0, 0.3, (40, 2, 4))
        dims = ("prompt", "favoured", "order")
        orders = xr.Dataset(
            {
                "logit_bias": (dims, bias),
                "count_bias": (dims, bias / 4),
                "correct": (dims, bias > 0),
                "top1_correct": (dims, bias > 1),
            },
            {"favoured": ["foo", "bar"], "order": list(ORDERS)},
        )
        part = falls + rng.normal(0, 0.1, (40, 6, 2))
        names = ("position_part", "whole_score", "near_attention")
        positions = xr.Dataset(
            {name: (("prompt", "layer", "head"), part) for name in names},
            {"layer": np.arange(6), "head": np.arange(2)},
        )
        heads = xr.Dataset(
            {"number": (("kind", "rank", "part"), [[[4, 0], [5, 1]], [[1, 0], [2, 1]]])},
            {"kind": ["writers", "in_context"]},
        )
        tables = {"orders": orders, "positions": positions, "heads": heads}
        run = xr.DataTree.from_dict({**tables, **mitigation({**OTHERS, **edits}, seed)})
        run.attrs["seed"] = seed
        runs.append(run)
    return runs


def test_supported(recency: ModuleType) -> None:
    found = recency.judge(made(HELPS))
    assert found.verdict == "supported"
    reduced = found.numbers["reduction of count bias, edit in chosen heads"]
    assert reduced.value == pytest.approx(0.6, abs=0.02)


@pytest.mark.parametrize(
    "edits",
    [
        {"as it is": 0.0, KINDS[0]: 0.0, KINDS[1]: 0.0},  # no bias
        {**HELPS, KINDS[0]: 2.6},  # the edit enlarges it
        {**HELPS, "random heads 1": 0.1, "random heads 2": 0.1},  # random heads do more
    ],
)
def test_not_supported(recency: ModuleType, edits: dict[str, float]) -> None:
    runs = made(edits)
    for run in runs:  # without noise, so that no bias is none and a difference is told
        for name, level in edits.items():
            run["mitigation"]["logit_bias"].loc[{"edit": name}] = level
    assert recency.judge(runs).verdict == "not supported"


@pytest.mark.parametrize(
    "changes",
    [
        {"levels": (2.0, 2.0, 2.0, 2.0)},  # alternating labels are as biased
        {"falls": 0.3},  # far positions score higher
    ],
)
def test_undecided(recency: ModuleType, changes: dict[str, object]) -> None:
    assert recency.judge(made(HELPS, **changes)).verdict == "undecided"


@pytest.fixture
def setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Setting:
    return small_setting(tmp_path, monkeypatch, "llama-grouped")


@pytest.mark.parametrize(
    ("block", "pattern"), [(1, "fnfnfnfn"), (2, "ffnnffnn"), (4, "ffffnnnn"), (0, None)]
)
def test_orders(recency: ModuleType, setting: Setting, block: int, pattern: str | None) -> None:
    _, test = setting.build(shots=4)
    mirrored = recency.with_nearest(test, block, seed=0)
    patterns = {}
    for label, prompts in mirrored.items():
        assert prompts.gold.tolist() == test.gold.tolist()
        held = [
            row[at] for row, at in zip(prompts.label_text, prompts.role == "label", strict=True)
        ]
        patterns[label] = ["".join("n" if x == label else "f" for x in row) for row in held]
        for before, after in zip(test.strings, prompts.strings, strict=True):
            assert sorted(before.splitlines()) == sorted(after.splitlines())
    # Mirrored: the same pattern of near and far labels.
    assert patterns["foo"] == patterns["bar"]
    if pattern is None:
        assert len(set(patterns["foo"])) > 1
        assert all(row.endswith("n") and row.count("n") == 4 for row in patterns["foo"])
    else:
        assert set(patterns["foo"]) == {pattern}


def test_correlations_by_hand(recency: ModuleType, setting: Setting) -> None:
    prompts = setting.test
    qk = tt.qk_similarity(setting.model, prompts, keep="labels")
    found = recency.by_distance(qk)
    whole = tt.qk_similarity(setting.model, prompts)
    for row in range(3):
        at = np.flatnonzero(prompts.role[row] == "label")
        distance = prompts.n_positions - 1 - at
        one = {name: whole[name].values[row, 1, 3, at].astype(float) for name in whole.data_vars}
        part = np.corrcoef(one["score"] - one["score_content"], distance)[0, 1]
        assert found["position_part"][row, 1, 3] == pytest.approx(part, abs=1e-3)
        score = np.corrcoef(one["score"], distance)[0, 1]
        assert found["whole_score"][row, 1, 3] == pytest.approx(score, abs=1e-3)
        near = distance < np.median(distance)
        more = one["attention"][near].sum() - one["attention"][~near].sum()
        assert found["near_attention"][row, 1, 3] == pytest.approx(more, abs=1e-5)


def test_other_than_two_labels_are_refused(recency: ModuleType, setting: Setting) -> None:
    prompts = tt.build_prompts(setting.model, THREE, shots=2, n=2)
    with pytest.raises(tt.errors.InputError, match="takes two labels, not foo, bar, map"):
        recency.with_nearest(prompts, 2, seed=0)


@pytest.mark.parametrize(("name", "n_edits"), [("llama-grouped", 18), ("gpt2", 11)])
def test_edits_that_are_tried(
    recency: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, n_edits: int
) -> None:
    found = recency.candidates(small_setting(tmp_path, monkeypatch, name))
    assert len(found) == n_edits
    # Learned positions have no distances to choose from.
    assert any("distance mean" in one for one in found) == (name != "gpt2")
    assert {head.layer for head in found[next(x for x in found if "shallow" in x)].heads} == {0}


def test_measures_what_is_judged(
    recency: ModuleType, setting: Setting, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    one_of_each_kind(recency, setting, monkeypatch)
    tables = recency.measure(setting)
    assert tables["orders"]["logit_bias"].shape == (4, 2, 4)
    edits = tables["mitigation"]["edit"].values.tolist()
    assert edits == ["as it is", *KINDS, "shallow heads", "all heads", *list(OTHERS)[2:]]
    assert np.isfinite(tables["mitigation"]["logit_bias"]).all()
    # As it is stored and read again.
    save(
        make_tree(tables, {**provenance(setting.model, setting.test), "seed": 0}), tmp_path / "run"
    )
    run = tt.open(tmp_path / "run").load()
    found = recency.judge([run])
    assert set(found.numbers) >= {f"accuracy between the labels, edit in {kind}" for kind in KINDS}
    assert recency.draw([run], found) is not None
