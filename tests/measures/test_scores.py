"""AUCs pair by pair, heads by sorting, and runs that cannot be compared."""

from __future__ import annotations

import numpy as np
import pytest
import xarray as xr
from tiny import THREE, TWO

import twotower as tt
from twotower.measures.agreement import agreement
from twotower.measures.scores import auc


def pairs(high: list[float], low: list[float]) -> float | None:
    """Share of pairs in which the first is larger; a tie is half a pair."""
    if not high or not low:
        return None
    wins = 0.0
    for x in high:
        for y in low:
            wins += 1.0 if x > y else 0.5 if x == y else 0.0
    return wins / (len(high) * len(low))


def qk_by_pairs(scores: xr.DataArray, layer: int, head: int) -> float:
    found = []
    for i in range(scores.sizes["prompt"]):
        high, low = [], []
        for p in range(scores.sizes["position"]):
            if scores["role"].values[i, p] != "label":
                continue
            same = scores["demonstration_class"].values[i, p] == scores["query_class"].values[i]
            (high if same else low).append(float(scores.values[i, layer, head, p]))
        if (share := pairs(high, low)) is not None:
            found.append(share)
    return sum(found) / len(found)


def ov_by_pairs(logits: xr.DataArray, layer: int, head: int) -> float:
    found, labels = [], logits["label"].values.tolist()
    for i in range(logits.sizes["prompt"]):
        for number, label in enumerate(labels):
            high, low = [], []
            for p in range(logits.sizes["position"]):
                if logits["role"].values[i, p] != "label":
                    continue
                values = [float(x) for x in logits.values[i, layer, head, p]]
                others = [x for n, x in enumerate(values) if n != number]
                said = values[number] - sum(others) / len(others)
                holds = logits["label_text"].values[i, p] == label
                (high if holds else low).append(said)
            if (share := pairs(high, low)) is not None:
                found.append(share)
    return sum(found) / len(found)


@pytest.fixture(scope="module", params=["all", "labels"])
def run(request: pytest.FixtureRequest, llama: tt.Model) -> xr.DataTree:
    shots = {"foo": 3, "bar": 2, "map": 0}  # in some prompts the query's class is missing
    prompts = tt.build_prompts(llama, THREE, shots=shots, n=7, seed=4)
    run = tt.analyze(llama, prompts, keep=request.param)
    for group, name in (("qk", "score"), ("qk", "score_content"), ("ov", "label_logit")):
        # Ties, and numbers that float32 adds and halves without rounding.
        run[group][name] = (run[group][name] * 4).round() / 4
    return run


def test_aucs_are_shares_of_pairs(run: xr.DataTree) -> None:
    missing = [
        c not in set(classes)
        for c, classes in zip(
            run["qk"]["query_class"].values,
            run["qk"]["demonstration_class"].values.tolist(),
            strict=True,
        )
    ]
    assert any(missing)
    assert not all(missing)
    scores = tt.two_tower_scores(run)
    for layer, head in np.ndindex(3, 4):
        one = scores.isel(layer=layer, head=head)
        for name, variable in (("qk_auc", "score"), ("qk_auc_content", "score_content")):
            expected = qk_by_pairs(run["qk"][variable], layer, head)
            assert one[name].item() == pytest.approx(expected, abs=1e-12)
        expected = ov_by_pairs(run["ov"]["label_logit"], layer, head)
        assert one["ov_auc"].item() == pytest.approx(expected, abs=1e-12)
        effects = run["effects"]["margin_drop"].values[:, layer, head]
        assert one["margin_drop"].item() == pytest.approx(effects.mean(), rel=1e-5)


def test_ov_auc_pair_by_pair(llama: tt.Model) -> None:
    """As measured, where no two positions say the same."""
    prompts = tt.build_prompts(llama, THREE, shots={"foo": 3, "bar": 2, "map": 1}, n=4, seed=4)
    run = tt.analyze(llama, prompts, measures=("qk", "ov"))
    scores = tt.two_tower_scores(run)
    assert "margin_drop" not in scores
    for layer, head in np.ndindex(3, 4):
        expected = ov_by_pairs(run["ov"]["label_logit"], layer, head)
        found = scores["ov_auc"].values[layer, head]
        assert found == pytest.approx(expected, abs=1e-12)


def test_constant_scores_are_chance(run: xr.DataTree) -> None:
    flat = run.copy(deep=True)
    flat["qk"]["score"] = flat["qk"]["score"] * 0 + 3
    flat["ov"]["label_logit"] = flat["ov"]["label_logit"] * 0
    scores = tt.two_tower_scores(flat)
    assert (scores["qk_auc"] == 0.5).all()
    assert (scores["ov_auc"] == 0.5).all()


def test_perfect_heads_have_one(run: xr.DataTree) -> None:
    best = run.copy(deep=True)
    qk, ov = best["qk"].to_dataset(inherit=False), best["ov"].to_dataset(inherit=False)
    same = (qk["demonstration_class"] == qk["query_class"]) * 1.0
    says = (ov["label_text"] == ov["label"]) * 1.0
    best["qk"]["score"] = qk["score"] * 0 + same
    best["ov"]["label_logit"] = ov["label_logit"] * 0 + says
    scores = tt.two_tower_scores(best)
    assert (scores["qk_auc"] == 1).all()
    assert (scores["ov_auc"] == 1).all()


def test_a_run_without_any_comparison_is_still_a_run(llama: tt.Model) -> None:
    prompts = tt.build_prompts(llama, TWO, shots={"foo": 2, "bar": 0}, n=2, seed=1)
    run = tt.analyze(llama, prompts)
    assert np.isfinite(run["effects"]["margin_drop"]).all()
    for name in ("qk_auc", "qk_auc_content", "ov_auc"):
        assert run["scores"][name].shape == (3, 4)
        assert np.isnan(run["scores"][name]).all()
    assert np.isfinite(run["scores"]["margin_drop"]).all()


def test_head_choice_by_sorting(run: xr.DataTree) -> None:
    effects = run["effects"].to_dataset(inherit=False)
    everything = [tt.Head(layer, head) for layer, head in np.ndindex(3, 4)]
    for label in (None, "foo", "bar"):
        strength = {}
        for head in everything:
            rows = [
                float(effects["margin_drop"].values[i][head])
                if label is None
                else float(effects["logprob_drop"].values[i][head][("foo", "bar").index(label)])
                for i in range(7)
                if label is None or effects["gold"].values[i] == label
            ]
            strength[head] = sum(rows) / len(rows)
        order = sorted(everything, key=lambda head: -strength[head])
        assert len({round(x, 6) for x in strength.values()}) == 12  # no two alike
        for k in range(1, 13):
            found = tt.in_context_heads(run, k, label=label)
            assert found == order[:k]
            assert all(isinstance(head, tt.Head) for head in found)


def test_equal_heads_keep_their_order(run: xr.DataTree) -> None:
    effects = run["effects"].to_dataset(inherit=False)
    flat = effects.assign(margin_drop=effects["margin_drop"] * 0)
    assert tt.in_context_heads(flat, 5) == [(0, 0), (0, 1), (0, 2), (0, 3), (1, 0)]


def test_a_part_of_the_heads_keeps_its_names(run: xr.DataTree) -> None:
    upper = run["effects"].to_dataset(inherit=False).isel(layer=[1, 2], head=[1, 3])
    found = tt.in_context_heads(upper, 4)
    assert set(found) == {(1, 1), (1, 3), (2, 1), (2, 3)}
    mean = upper["margin_drop"].mean("prompt")
    drops = [mean.sel(layer=layer, head=head).item() for layer, head in found]
    assert drops == sorted(drops, reverse=True)


@pytest.mark.parametrize("k", [0, -1, 13, True, 2.0, "3", None])
def test_bad_numbers_of_heads(run: xr.DataTree, k) -> None:
    with pytest.raises(tt.errors.InputError, match="must be a whole number, from 1 to 12"):
        tt.in_context_heads(run, k)


def test_a_label_that_is_never_right(run: xr.DataTree) -> None:
    effects = run["effects"].to_dataset(inherit=False)
    wrong = effects.isel(prompt=np.flatnonzero(effects["gold"].values != "foo"))
    with pytest.raises(tt.errors.InputError, match="right answer of no prompt"):
        tt.in_context_heads(wrong, 3, label="foo")


def test_missing_values_leave_out_their_pairs_alone() -> None:
    values = np.array([[1.0, 5.0], [3.0, np.nan], [2.0, 1.0]])
    found = auc(values, np.array([True, True, False]))
    np.testing.assert_array_equal(found, [0.5, 1.0])


def test_values_that_are_not_finite_are_counted(run: xr.DataTree) -> None:
    counted = run.copy()
    for number, name in enumerate(("qk", "ov", "effects")):
        counted[name].attrs["not_finite_values"] = 2**number
    assert tt.two_tower_scores(counted).attrs["not_finite_values"] == 7


def test_groups_of_other_models_or_prompts_are_refused(run: xr.DataTree) -> None:
    for attribute, what in (("weights_hash", "weights"), ("prompts_hash", "prompts")):
        mixed = run.copy()
        mixed["ov"].attrs[attribute] = "another"
        with pytest.raises(tt.errors.InputError, match=f"different {what}"):
            tt.two_tower_scores(mixed)
        with pytest.raises(tt.errors.InputError, match=f"different {what}"):
            mixed.tt.weighted()
    fewer = run.copy()
    fewer["effects"] = fewer["effects"].to_dataset().isel(prompt=slice(3))
    with pytest.raises(tt.errors.InputError, match="select the same prompts"):
        tt.two_tower_scores(fewer)
    other = run.copy()
    other["ov"] = other["ov"].to_dataset().isel(head=[0, 1])
    with pytest.raises(tt.errors.InputError, match="other values of 'head'"):
        tt.two_tower_scores(other)


def test_the_same_prompts_are_combined(run: xr.DataTree) -> None:
    mixed = run.copy()
    mixed["ov"] = mixed["ov"].to_dataset().isel(prompt=slice(None, None, -1))
    xr.testing.assert_allclose(tt.two_tower_scores(mixed), tt.two_tower_scores(run))
    parts = {name: run[name].to_dataset() for name in ("qk", "ov", "effects")}
    half = run.sizes["prompt"] // 2 if "prompt" in run.sizes else parts["qk"].sizes["prompt"] // 2
    parts = {name: part.isel(prompt=slice(half)) for name, part in parts.items()}
    parts["ov"] = run["ov"].to_dataset().isel(prompt=slice(half, 2 * half))
    with pytest.raises(tt.errors.InputError, match="other values of 'prompt'"):
        tt.two_tower_scores(xr.DataTree.from_dict(parts))


def test_repeated_prompts_are_scored_again(run: xr.DataTree) -> None:
    """As in a bootstrap: as many prompts as before, and others."""
    n = run["qk"].sizes["prompt"]
    drawn = run.isel(prompt=[0, 0, *range(2, n)])
    expected = tt.two_tower_scores(drawn)
    table = drawn.tt.to_frame().set_index(["layer", "head"])
    for name in ("qk_auc", "ov_auc"):
        known = expected[name].to_series()
        np.testing.assert_allclose(table[name].loc[known.index], known)
    assert not np.allclose(expected["ov_auc"], tt.two_tower_scores(run)["ov_auc"])


def test_effects_are_compared_head_by_head(llama: tt.Model, run: xr.DataTree) -> None:
    exact = run["effects"].to_dataset()
    other = exact.copy(deep=True)
    other["margin_drop"] = other["margin_drop"] + 0.1 * np.random.default_rng(0).normal(
        size=other["margin_drop"].shape
    )
    expected = agreement(exact, other, 3)
    for turned in (
        other.isel(layer=slice(None, None, -1)),
        other.isel(head=slice(None, None, -1)),
        other.isel(prompt=slice(None, None, -1)),
    ):
        assert agreement(exact, turned, 3) == expected
    with pytest.raises(tt.errors.InputError, match="other values of 'prompt'"):
        agreement(exact.isel(prompt=[0, 1]), other.isel(prompt=[2, 3]), 3)
    with pytest.raises(tt.errors.InputError, match="different weights"):
        agreement(exact, other.assign_attrs(weights_hash="other"), 3)


def test_the_order_of_heads_does_not_matter(run: xr.DataTree) -> None:
    turned = run.copy()
    turned["qk"] = run["qk"].to_dataset().isel(layer=slice(None, None, -1), head=[2, 0, 3, 1])
    found, expected = tt.two_tower_scores(turned), tt.two_tower_scores(run)
    xr.testing.assert_allclose(found.sortby(["layer", "head"]), expected)


def test_a_table_of_some_prompts(run: xr.DataTree) -> None:
    """Scores that were stored are of all prompts."""
    part = run.isel(prompt=slice(2, 5))
    table = part.tt.to_frame().set_index(["layer", "head"])
    expected = tt.two_tower_scores(part)
    for name in ("qk_auc", "ov_auc"):
        known = expected[name].to_series()
        np.testing.assert_allclose(table[name].loc[known.index], known)
