"""Prompts that overflow in float16 are missing everywhere, and touch no other prompt's number."""

from __future__ import annotations

import warnings
from types import SimpleNamespace
from typing import Any

import not_finite as given
import numpy as np
import pytest
import torch
import xarray as xr
from surface import GROUPS, MEASURES, under
from tiny import TWO, byte_level, hf_model

import twotower as tt
from twotower.measures.agreement import Agreement, agreement
from twotower.measures.bias import bias_reduction
from twotower.measures.group_effects import strongest_group, subset_effects
from twotower.results import measured_prompts
from twotower.statistics import above_chance, bootstrap_mean, mean_known, reduction

PLAIN = {name: MEASURES[name] for name in MEASURES if name not in ("edits", "resample", "mean")}


@pytest.fixture(scope="module")
def prompts() -> tt.Prompts:
    found = given.prompts()
    assert 2 <= given.holds(found).sum() <= len(found) - 4
    return found


@pytest.fixture(scope="module")
def bad(prompts: tt.Prompts) -> np.ndarray:
    return given.holds(prompts)


@pytest.fixture(scope="module")
def good(bad: np.ndarray) -> np.ndarray:
    return np.flatnonzero(~bad)


def test_transformers_own_forward_overflows(prompts: tt.Prompts, bad: np.ndarray) -> None:
    model = given.model().traced._module
    for number, row in enumerate(prompts.token_id):
        ids = torch.tensor(row[row >= 0])[None]
        with torch.no_grad():
            logits = model(input_ids=ids, use_cache=False).logits[0, -1].float()
        assert bool(logits.isfinite().all()) == (not bad[number])


def test_the_warning_names_the_users_line(prompts: tt.Prompts) -> None:
    with pytest.warns(tt.errors.NotFiniteWarning) as told:
        tt.analyze(given.model(), prompts)
    assert told[0].filename == __file__


@pytest.mark.parametrize("name", PLAIN)
def test_as_the_finite_prompts_alone(
    name: str, prompts: tt.Prompts, bad: np.ndarray, good: np.ndarray
) -> None:
    call, model = PLAIN[name], given.model()
    with pytest.warns(tt.errors.NotFiniteWarning) as told:
        found = call(model, prompts)
    assert len(told) == 1
    assert f"{bad.sum()} of {len(bad)} prompts" in str(told[0].message)
    assert ", ".join(map(str, np.flatnonzero(bad)[:5])) in str(told[0].message)
    assert "dtype='float32'" in str(told[0].message)
    expected = call(model, prompts[good])
    given.same_on_finite(found, expected)
    for part in given.parts(found):
        assert part.attrs["not_finite"] == bad.sum()
        if "prompt" in part.dims and part.attrs["twotower_group"] != "prompts":
            given.is_missing(part, bad)
    for part in given.parts(expected):
        assert part.attrs["not_finite"] == part.attrs["not_finite_values"] == 0
        assert "finite" not in part.coords
    if isinstance(found, xr.DataTree):
        assert found.attrs["not_finite"] == bad.sum()


@pytest.mark.parametrize("positions", ["last", "labels", "all"])
def test_no_number_of_another_prompt_changes(
    positions: str, prompts: tt.Prompts, good: np.ndarray
) -> None:
    """Exactly: in whatever batch a prompt stands beside one that overflows."""
    model = given.model()
    with given.unwarned():
        found = tt.head_effects(model, prompts, positions)
    alone = under(tt.head_effects, model, prompts[good], positions, batch_size=1)
    for name in ("margin_drop", "logprob_drop"):
        assert np.isfinite(alone[name]).all()
        np.testing.assert_allclose(found[name].values[good], alone[name], rtol=0.02, atol=0.02)


def test_all_are_missing(prompts: tt.Prompts, bad: np.ndarray) -> None:
    some, model = prompts[np.flatnonzero(bad)], given.model()
    for name in ("predict", "last", "labels", "groups", "gradient", "qk", "ov", "tracing"):
        with pytest.warns(tt.errors.NotFiniteWarning):
            found = MEASURES[name](model, some)
        given.is_missing(found, np.ones(len(some), dtype=bool))
    with given.unwarned():
        run = tt.analyze(model, some)
        effects, groups = tt.head_effects(model, some), tt.group_effects(model, some, GROUPS)
        bias = tt.label_bias(tt.predict(model, some), some.gold)
        assert all(np.isnan(x).all() for x in run["scores"].data_vars.values())
        for choose in (
            lambda: tt.in_context_heads(effects, 2),
            lambda: run.tt.heads(2),
            lambda: strongest_group(groups, 2),
            lambda: tt.greedy_heads(model, some, 1),
            lambda: agreement(effects, effects),
            lambda: bias_reduction(bias, bias),
        ):
            with pytest.raises(tt.errors.InputError, match=r"finite.*float32"):
                choose()


@pytest.fixture(scope="module")
def both(prompts: tt.Prompts, good: np.ndarray) -> tuple[xr.DataTree, xr.DataTree]:
    """A run of all prompts, and one of the finite ones alone."""
    with given.unwarned():
        run = tt.analyze(given.model(), prompts)
    return run, tt.analyze(given.model(), prompts[good])


def test_what_is_made_of_a_run(both: Any) -> None:
    run, alone = both
    for name, values in alone["scores"].data_vars.items():
        np.testing.assert_allclose(run["scores"][name], values, atol=2e-2)
    for by in ("margin_drop", "label_logit"):
        assert run.tt.heads(3, by=by) == alone.tt.heads(3, by=by)
    assert tt.in_context_heads(run, 2, label="foo") == tt.in_context_heads(alone, 2, label="foo")
    one, other = (x["effects"].tt.mean_ci("prompt")["margin_drop"] for x in both)
    np.testing.assert_allclose(one, other, atol=2e-2)
    for name in ("margin_drop", "label_logit", "qk_auc", "ov_auc"):
        np.testing.assert_allclose(run.tt.to_frame()[name], alone.tt.to_frame()[name], atol=2e-2)


def test_agreement_leaves_them_out(prompts: tt.Prompts, good: np.ndarray) -> None:
    model = given.model()
    with given.unwarned():
        exact = tt.head_effects(model, prompts)
        other = tt.attribution_patching(model, prompts)
    found = agreement(exact, other, 3)
    alone = agreement(exact.isel(prompt=good), other.isel(prompt=good), 3)
    same_agreement(found, alone)
    # One more prompt is missing in one of the two: it counts in neither.
    less = other.copy(deep=True)
    less["margin_drop"][int(good[0])] = np.nan
    expected = agreement(exact.isel(prompt=good[1:]), other.isel(prompt=good[1:]), 3)
    same_agreement(agreement(exact, less, 3), expected)


def same_agreement(found: Agreement, expected: Agreement) -> None:
    assert found.missed == expected.missed
    for name in ("rank_correlation", "rank_correlation_by_prompt", "found"):
        assert getattr(found, name) == pytest.approx(getattr(expected, name), abs=1e-9)


def test_biases_leave_them_out(prompts: tt.Prompts, good: np.ndarray, bad: np.ndarray) -> None:
    model, favoured = given.model(), prompts.gold
    with given.unwarned():
        before = tt.label_bias(tt.predict(model, prompts), favoured)
        after = tt.label_bias(
            tt.predict(model, prompts, tt.KnockOut([(1, 1)], positions="all")), favoured
        )
    given.is_missing(before, bad)
    assert (before["favoured"].values == favoured).all()
    few = prompts[good]
    b = tt.label_bias(tt.predict(model, few), favoured[good])
    a = tt.label_bias(
        tt.predict(model, few, tt.KnockOut([(1, 1)], positions="all")), favoured[good]
    )
    for kind in ("logit_bias", "count_bias"):
        np.testing.assert_allclose(before[kind].values[good], b[kind], atol=2e-2)
        one, other = (
            bias_reduction(before, after, kind),
            bias_reduction(b, a, kind),
        )
        assert (one is None) == (other is None)
        if one is not None and other is not None:
            np.testing.assert_allclose(one, other, atol=0.05)


def test_groups_are_chosen_of_finite_prompts(prompts: tt.Prompts, good: np.ndarray) -> None:
    pool, model = [(0, 1), (1, 2), (2, 3)], given.model()
    with given.unwarned():
        found = subset_effects(model, prompts, pool)
        greedy = tt.greedy_heads(model, prompts, 2)
    alone = subset_effects(model, prompts[good], pool)
    for k in (1, 2, 3):
        assert strongest_group(found, k) == strongest_group(alone, k)
    expected = tt.greedy_heads(model, prompts[good], 2)
    for name in ("chosen_layer", "chosen_head"):
        np.testing.assert_array_equal(greedy[name], expected[name])


def test_a_mean_leaves_reference_prompts_out(
    prompts: tt.Prompts, good: np.ndarray, bad: np.ndarray
) -> None:
    model, few = given.model(), prompts[good]
    with pytest.warns(
        tt.errors.NotFiniteWarning, match=f"{bad.sum()} of 16 reference prompts"
    ) as told:
        found = tt.head_effects(model, few, to=tt.Mean(prompts))
    assert len(told) == 1
    expected = tt.head_effects(model, few, to=tt.Mean(few))
    given.same_on_finite(found, expected)
    none = prompts[np.flatnonzero(bad)]
    refused = pytest.raises(
        tt.errors.InputError, match=r"no reference prompt with finite logits.*float32"
    )
    with refused, given.unwarned():
        tt.head_effects(model, few, to=tt.Mean(none))


def test_a_donor_that_is_not_finite_makes_its_prompt_missing(
    prompts: tt.Prompts, good: np.ndarray, bad: np.ndarray
) -> None:
    model = given.model()
    few, donors = prompts[good[:4]], prompts[np.array([*np.flatnonzero(bad)[:2], *good[4:6]])]
    lost = np.array([True, True, False, False])
    with pytest.warns(tt.errors.NotFiniteWarning, match="2 of 4 prompts"):
        found = tt.head_effects(model, few, to=tt.From(donors))
    given.is_missing(found, lost)
    expected = tt.head_effects(model, few[2:], to=tt.From(donors[2:]))
    given.same_on_finite(found, expected)
    aligned = few.reversed_labels()
    patches = [tt.Patch([(1, 2)], aligned, what) for what in ("attention", "values")]
    for patch in [tt.KnockOut([(1, 2)], to=tt.From(aligned)), *patches]:
        assert tt.predict(model, few, patch).attrs["not_finite"] == 0
    with given.unwarned():
        found = tt.head_effects(model, few, to=tt.Resample(prompts[np.flatnonzero(bad)]))
    given.is_missing(found, np.ones(4, dtype=bool))


def test_tracing_needs_both_prompts(prompts: tt.Prompts, good: np.ndarray, bad: np.ndarray) -> None:
    model = given.model()
    few, other = prompts[good[:4]], prompts[np.array([*np.flatnonzero(bad)[:2], *good[4:6]])]
    lost = np.array([True, True, False, False])
    for clean, corrupted in ((few, other), (other, few)):
        with pytest.warns(tt.errors.NotFiniteWarning, match="2 of 4 prompts"):
            given.is_missing(tt.causal_tracing(model, clean, corrupted), lost)


@pytest.fixture(scope="module")
def edgy() -> tt.Model:
    """A model in float16 that does not overflow by itself."""
    hf = hf_model("llama-grouped").half()
    return tt.load(hf, tokenizer=byte_level())


def test_single_counterfactuals(edgy: tt.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that overflows is NaN in all that is said of it, and left out of its head's mean."""
    from twotower.sweep.sweep import Sweep

    prompts = tt.build_prompts(edgy, TWO, shots=2, n=4, seed=2)
    expected = tt.head_effects(edgy, prompts)
    plain = Sweep._scores

    def broken(self: Any, residual: torch.Tensor, end: Any) -> dict[str, torch.Tensor]:
        found = plain(self, residual, end)
        if residual.shape[1] > 1:
            margins = found["margin"] = found["margin"].clone()
            margins[1, 6], margins[2, 6], margins[2, 0] = torch.inf, torch.nan, -torch.inf
        return found

    monkeypatch.setattr(Sweep, "_scores", broken)
    with pytest.warns(tt.errors.NotFiniteWarning, match="3 single values") as told:
        found = under(tt.head_effects, edgy, prompts, batch_size=4)
    assert len(told) == 1
    assert (found.attrs["not_finite"], found.attrs["not_finite_values"]) == (0, 3)
    lost = np.zeros((4, 12), dtype=bool)
    order = np.argsort(-prompts.lengths, kind="stable")  # as the batch has them
    lost[order[1], 6] = lost[order[2], 6] = lost[order[2], 0] = True
    lost = lost.reshape(4, 3, 4)
    np.testing.assert_array_equal(np.isnan(found["margin_drop"]), lost)
    np.testing.assert_array_equal(np.isnan(found["logprob_drop"]).all("label"), lost)
    there = expected["margin_drop"].where(~lost)
    np.testing.assert_allclose(found["margin_drop"], there, atol=1e-6)
    heads = tt.in_context_heads(found, 12)
    mean = there.mean("prompt").values
    assert [mean[x] for x in heads] == sorted(mean.ravel(), reverse=True)


def test_what_overflows_reaches_no_prompt_beside_it(
    edgy: tt.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where prompts share rows, those that a NaN may have reached are measured by themselves."""
    from twotower.sweep.sweep import Sweep

    prompts = tt.build_prompts(edgy, TWO, shots=2, n=4, seed=2)
    expected = under(tt.head_effects, edgy, prompts, "all", batch_size=1)
    plain, sizes = Sweep.finish, []

    def leaking(self: Any, end: Any) -> dict[str, torch.Tensor]:
        found = plain(self, end)
        sizes.append(len(found["margin_drop"]))
        if sizes[-1] > 1:
            found["margin_drop"][:2, 1, 1] = torch.nan
        return found

    monkeypatch.setattr(Sweep, "finish", leaking)
    found = under(tt.head_effects, edgy, prompts, "all", batch_size=4)
    assert sizes == [4, 1, 1]
    assert found.attrs["not_finite_values"] == 0
    given.same_on_finite(found, expected)


def test_a_vocabulary_entry_of_minus_infinity_is_fine() -> None:
    from twotower.walk.everywhere import Everywhere
    from twotower.walk.not_finite import Finite
    from twotower.walk.views import End

    logits = torch.zeros(6, 5)
    logits[1, 4] = -torch.inf  # not a label
    logits[2, 0] = -torch.inf  # a label
    logits[3, 4] = torch.inf
    logits[4, 4] = torch.nan
    logits[5, 1] = torch.nan
    end = End(torch.zeros(6, 2), logits, None, None, logits.dtype)
    ids = Everywhere(torch.tensor([0, 1]).expand(6, 2), [logits.device])
    answers = SimpleNamespace(ids=ids, n_reads=1)
    found = Finite(answers).finish(end)["finite"]
    assert found.tolist() == [True, True, False, False, False, False]


def test_an_overflow_that_an_edit_takes_away(prompts: tt.Prompts, bad: np.ndarray) -> None:
    """Heads above the overflow read it, and nothing else does."""
    model = given.model()
    heads = [head for head in model.heads if head.layer > 0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = tt.predict(model, prompts, tt.KnockOut(heads, "all"))
    assert bad.any()
    assert np.isfinite(found["margin"]).all()
    for number in np.flatnonzero(bad)[:2]:
        alone = tt.predict(model, prompts[[int(number)]], tt.KnockOut(heads, "all"))
        np.testing.assert_allclose(alone["margin"][0], found["margin"][number], atol=2e-2)


def test_finite_prompts_have_no_warning_and_booleans(llama: tt.Model) -> None:
    prompts = tt.build_prompts(llama, TWO, shots=2, n=3, seed=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = tt.predict(llama, prompts)
    assert found["correct"].dtype == found["top1_correct"].dtype == bool
    assert measured_prompts(found) is found


def test_statistics_leave_missing_numbers_out() -> None:
    nan = np.nan
    values = np.array([1.0, 0, nan, 1, 1, nan])
    assert bootstrap_mean(values) == bootstrap_mean(values[[0, 1, 3, 4]])
    assert bootstrap_mean(values).n == 4
    assert bootstrap_mean(np.full(3, nan)).n == 0
    assert above_chance(values, 0.5) == above_chance(np.array([True, False, True, True]), 0.5)
    assert above_chance(np.full(3, nan), 0.5) == 1
    before, after = np.array([1.0, 2, nan, 3, 2]), np.array([0.5, nan, 1, 1, 1])
    assert reduction(before, after) == reduction(before[[0, 3, 4]], after[[0, 3, 4]])
    assert reduction(before * nan, after) is None
    table = np.array([[1.0, nan], [3.0, nan]])
    np.testing.assert_array_equal(mean_known(table), [2, nan])
