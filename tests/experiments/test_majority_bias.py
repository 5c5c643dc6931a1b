"""Majority-label bias: the verdict's rule, attention summed by hand, edits at the right keys."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import xarray as xr
from bias_runs import KINDS, mitigation, one_of_each_kind, small_setting

import twotower as tt
from twotower.experiments.experiment import Setting
from twotower.results import make_tree, provenance, save

AT = ("5:3", "6:2", "7:1", "12:4", "14:2")
HELPS = {"as it is": 2.0, KINDS[0]: 0.8, KINDS[1]: 1.6}
RANDOM = {"random heads 1": 2.0, "random heads 2": 2.1}


@pytest.fixture(scope="module")
def majority() -> ModuleType:
    return importlib.import_module("experiments.majority_bias")


def made(
    edits: Mapping[str, float],
    levels: tuple[float, ...] = (0.5, 1.0, 2.0, 0.5, 1.2),
    linked: float = 1.0,
) -> list[xr.DataTree]:
    """Runs of three seeds; `linked` is how far attention follows the logit bias."""
    runs = []
    for seed in range(3):
        rng = np.random.default_rng(seed)
        noise = rng.normal(0, 0.3, (40, 2, len(levels)))
        bias = np.array(levels) + noise
        own = rng.normal(0, 0.05, (40, 2, 2, len(levels)))
        attention = 0.2 * np.array(levels) + 0.2 * linked * noise[:, :, None] + own
        table = xr.Dataset(
            {
                "logit_bias": (("prompt", "favoured", "imbalance"), bias),
                "count_bias": (("prompt", "favoured", "imbalance"), bias / 4),
                "attention": (("prompt", "favoured", "kind", "imbalance"), attention),
            },
            {"favoured": ["foo", "bar"], "imbalance": list(AT), "kind": list(KINDS)},
        )
        tables = {"imbalance": table, **mitigation({**edits, **RANDOM}, seed)}
        run = xr.DataTree.from_dict(tables)
        run.attrs["seed"] = seed
        runs.append(run)
    return runs


def test_supported(majority: ModuleType) -> None:
    found = majority.judge(made(HELPS))
    assert found.verdict == "supported"
    assert found.numbers["reduction of logit bias, edit in chosen heads"].value == pytest.approx(
        0.6, abs=0.02
    )


@pytest.mark.parametrize(
    "edits",
    [
        {"as it is": 0.0, KINDS[0]: 0.0, KINDS[1]: 0.0},  # no bias
        {**HELPS, KINDS[0]: 2.6},  # the edit enlarges it
        {**HELPS, KINDS[0]: -2.6},  # and so it does to the other side
        {**HELPS, KINDS[0]: 2.04, "random heads 1": 1.0},  # random heads do more
    ],
)
def test_not_supported(majority: ModuleType, edits: dict[str, float]) -> None:
    runs = made(edits)
    for run in runs:
        for name, level in edits.items():
            run["mitigation"]["logit_bias"].loc[{"edit": name}] = level
    assert majority.judge(runs).verdict == "not supported"


@pytest.mark.parametrize(
    "changes",
    [
        {"levels": (2.0, 2.0, 2.0, 0.5, 1.2)},  # does not grow with the imbalance
        {"linked": -1.0},  # attention does not go along with it
    ],
)
def test_undecided(majority: ModuleType, changes: dict[str, object]) -> None:
    assert majority.judge(made(HELPS, **changes)).verdict == "undecided"


def test_without_a_count_bias_its_reduction_is_not_reported(majority: ModuleType) -> None:
    runs = made(HELPS)
    for run in runs:
        run["mitigation"]["count_bias"][:] = 0.0
    found = majority.judge(runs)
    assert found.verdict == "undecided"
    assert "not reported" in found.numbers["reduction of count bias, edit in chosen heads"]


def test_correlation_by_hand(majority: ModuleType) -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=50)
    y = x + rng.normal(size=50)
    found = majority.correlation(x, y)
    assert found.value == pytest.approx(np.corrcoef(x, y)[0, 1])
    assert found.low < found.value < found.high


@pytest.fixture
def setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Setting:
    return small_setting(tmp_path, monkeypatch, "llama-grouped")


def test_prompts_mirror_and_halves_share_no_text(majority: ModuleType, setting: Setting) -> None:
    fit, test = majority.prompts_at(setting, (7, 1))
    for label, prompts in test.items():
        held = prompts.label_text[prompts.role == "label"]
        assert (held == label).mean() == 7 / 8
    assert test["foo"].gold.tolist() == test["bar"].gold.tolist()
    texts = [half["foo"].texts | half["bar"].texts for half in (fit, test)]
    # Nor with the prompts on which heads are chosen.
    assert not texts[0] & texts[1]
    assert not setting.fit.texts & texts[1]


def test_summed_attention_by_hand(majority: ModuleType, setting: Setting) -> None:
    _, test = majority.prompts_at(setting, (5, 3))
    prompts = test["foo"]
    qk = tt.qk_similarity(setting.model, prompts)
    heads = [tt.Head(1, 2), tt.Head(2, 0)]
    found = majority.summed_attention(qk, "foo", [heads, heads[:1]])
    for row in range(len(prompts)):
        each = []
        for layer, head in heads:
            total = 0.0
            for position in np.flatnonzero(prompts.role[row] == "label"):
                sign = 1 if prompts.label_text[row, position] == "foo" else -1
                total += sign * float(qk["attention"].values[row, layer, head, position])
            each.append(total)
        np.testing.assert_allclose(found[row], [np.mean(each), each[0]], rtol=1e-4)


def test_ways_change_their_own_side(majority: ModuleType, setting: Setting) -> None:
    _, test = majority.prompts_at(setting, (7, 1))
    for label, prompts in test.items():
        (up,) = majority.reweight("minority x 2", [tt.Head(0, 0)])(prompts, label)
        (down,) = majority.reweight("majority x minority's share", [tt.Head(0, 0)])(prompts, label)
        assert up.keys.mask(prompts).sum() == len(prompts)
        assert down.keys.mask(prompts).sum() == 7 * len(prompts)
        assert (prompts.label_text[down.keys.mask(prompts)] == label).all()
        assert (up.factor, down.factor) == (2, 1 / 7)


def test_edits_that_are_tried(majority: ModuleType, setting: Setting) -> None:
    found = majority.candidates(setting)
    assert len(found) == 5 * len(majority.WAYS)
    assert {len(one.heads) for one in found.values() if one.kind == KINDS[0]} == {1, 2, 4}


def test_measures_what_is_judged(
    majority: ModuleType, setting: Setting, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    one_of_each_kind(majority, setting, monkeypatch)
    tables = majority.measure(setting)
    assert tables["imbalance"]["attention"].shape == (4, 2, 2, 5)
    edits = tables["mitigation"]["edit"].values.tolist()
    assert edits == ["as it is", *KINDS, "random heads 1", "random heads 2"]
    assert tables["fit"].sizes["edit"] == 3
    assert np.isfinite(tables["mitigation"]["logit_bias"]).all()
    # As it is stored and read again.
    save(
        make_tree(tables, {**provenance(setting.model, setting.test), "seed": 0}), tmp_path / "run"
    )
    run = tt.open(tmp_path / "run").load()
    found = majority.judge([run])
    assert set(found.numbers) >= {f"accuracy between the labels, edit in {kind}" for kind in KINDS}
    assert majority.draw([run], found) is not None
