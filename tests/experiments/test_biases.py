"""What the experiments on biases share: leanings by hand, choices, and which heads they are in."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import xarray as xr
from bias_runs import KINDS, SHORT, mitigation, small_setting
from tiny import tiny

import twotower as tt


@pytest.fixture(scope="module")
def biases() -> ModuleType:
    return importlib.import_module("twotower.experiments.biases")


def test_leanings_by_hand(biases: ModuleType) -> None:
    model = tiny("llama-grouped")
    found = {}
    for label, shots in (("foo", {"foo": 3, "bar": 1}), ("bar", {"foo": 1, "bar": 3})):
        found[label] = tt.predict(model, tt.build_prompts(model, SHORT, shots=shots, n=4, seed=0))
    leanings = biases.leanings(found)
    for column, (label, other) in enumerate((("foo", "bar"), ("bar", "foo"))):
        logit = found[label]["logit"]
        more = logit.sel(label=label) - logit.sel(label=other)
        np.testing.assert_allclose(leanings["logit_bias"][:, column], more, rtol=1e-5)
        assert leanings["count_bias"][:, column].tolist() == [0.5 if x > 0 else -0.5 for x in more]
        for name in ("correct", "top1_correct"):
            assert leanings[name][:, column].tolist() == found[label][name].values.tolist()


def test_mirrored_prompts_must_ask_the_same_and_favour_their_label(biases: ModuleType) -> None:
    model = tiny("llama-grouped")
    more = {"foo": 3, "bar": 1}
    foo = tt.build_prompts(model, SHORT, shots=more, n=4, seed=0)
    bar = tt.build_prompts(model, SHORT, shots={"foo": 1, "bar": 3}, n=4, seed=0)
    other = tt.build_prompts(model, SHORT, shots={"foo": 1, "bar": 3}, n=4, seed=1)
    biases.check_mirrored({"foo": foo, "bar": bar}, tt.majority_label)
    with pytest.raises(ValueError, match="ask other queries"):
        biases.check_mirrored({"foo": foo, "bar": other}, tt.majority_label)
    with pytest.raises(ValueError, match="do not favour 'bar'"):
        biases.check_mirrored({"foo": foo, "bar": foo}, tt.majority_label)


def test_share_left_counts_either_side_and_refuses_lost_accuracy(biases: ModuleType) -> None:
    logit = np.array([2.0, 1.0, -1.0, 0.0])  # no edit, half left, half to the other side, none
    count = np.array([0.4, 0.1, -0.3, 0.0])
    correct = np.ones((10, 2, 4))
    correct[:2, :, 3] = 0  # the last edit costs a fifth of the right answers
    found = {
        "logit_bias": np.broadcast_to(logit, (10, 2, 4)),
        "count_bias": np.broadcast_to(count, (10, 2, 4)),
        "correct": correct,
    }
    left = biases.share_left(found)
    np.testing.assert_allclose(left, [1, (0.5 + 0.25) / 2, (0.5 + 0.75) / 2, np.inf])


def test_numbers_of_queries_are_balanced(biases: ModuleType) -> None:
    assert [biases.queries(n) for n in (20, 23, 5, 2)] == [20, 20, 4, 4]


def test_edits_are_chosen_on_fitting_prompts_by_kind(
    biases: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    setting = small_setting(tmp_path, monkeypatch, "llama-grouped")
    seen = []

    def answers(setting, mirrored, edits, title):
        n = len(mirrored["foo"])
        seen.append((mirrored, dict(edits)))
        # On fitting prompts the edits leave 1, 0.5, 0.75, 0.2, 0.6 of a bias of 1.
        bias = np.array([1, 0.5, 0.75, 0.2, 0.6] if len(seen) == 1 else [1.0] * len(edits))
        values = np.broadcast_to(bias, (n, 2, len(bias)))
        right = {"correct": values > -1, "top1_correct": values > -1}
        return {"logit_bias": values, "count_bias": values, **right}

    monkeypatch.setattr(biases, "answers", answers)
    made = []
    heads = {kind: [tt.Head(number, 0)] for number, kind in enumerate((*KINDS, "shallow heads"))}

    def make(name):
        def of(heads):
            made.append((name, list(heads)))
            return lambda prompts, label: []

        return of

    candidates = {
        name: biases.Candidate(kind, heads[kind], make(name))
        for name, kind in (
            ("a", KINDS[0]),
            ("b", KINDS[0]),
            ("c", "shallow heads"),
            ("d", KINDS[1]),
        )
    }
    fit, test = (dict.fromkeys(("foo", "bar"), half) for half in (setting.fit, setting.test))
    tables = biases.mitigate(setting, fit, test, candidates)
    chosen = tables["choice"]
    assert chosen["edit_name"].values.tolist() == ["a", "c", "d"]
    np.testing.assert_allclose(chosen["left"].values, [0.5, 0.2, 0.6])
    # The shallow heads leave least, but the verdict is on the two kinds: "a" is the best.
    assert biases.chosen_kind(xr.DataTree.from_dict(tables)) == KINDS[0]
    random = [(name, drawn) for name, drawn in made if drawn not in heads.values()]
    assert [name for name, _ in random] == ["a", "a"]
    barred = {*biases.heads_of(setting, KINDS[0], 2), *biases.heads_of(setting, KINDS[1], 2)}
    assert not barred & {head for _, drawn in random for head in drawn}
    assert len(seen[0][0]["foo"]) == 4
    assert len(seen[1][0]["foo"]) == len(setting.test)
    assert list(seen[1][1])[-2:] == ["random heads 1", "random heads 2"]


def test_edited_takes_each_runs_own_choice(biases: ModuleType) -> None:
    levels = {"as it is": 2.0, KINDS[0]: 1.0, KINDS[1]: 0.5, "random heads 1": 1.8}
    levels |= {"random heads 2": 2.2}
    tables = [mitigation(levels, seed, spread=0.0) for seed in (0, 1)]
    tables[1]["choice"]["left"].values[:] = [0.9, 0.1]
    runs = [xr.DataTree.from_dict(one) for one in tables]
    found = biases.edited(runs, "logit_bias", "chosen heads")
    np.testing.assert_allclose(found, [1.0] * 40 + [0.5] * 40)
    np.testing.assert_allclose(biases.edited(runs, "logit_bias", "random heads"), 2.0)
