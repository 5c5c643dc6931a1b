"""What is shown of a run against the datasets: heads, prompts, runs of every kind."""

from __future__ import annotations

import numpy as np
import pytest
import xarray as xr
from tiny import THREE, TWO

import twotower as tt
from twotower.figures import head_table, prompt_view
from twotower.figures.views import marked_heads, one_run
from twotower.measures.choose import above_others


@pytest.fixture(scope="module")
def run(llama: tt.Model, prompts: tt.Prompts) -> xr.DataTree:
    return tt.analyze(llama, prompts)


def test_head_table(run: xr.DataTree) -> None:
    table = head_table(run)
    drop = run.effects.margin_drop.values.mean(axis=0)
    np.testing.assert_allclose(table.margin_drop.values, drop, rtol=1e-6)
    gold = run.attribution.gold.values
    logit = run.attribution.label_logit
    own = np.stack([logit.sel(label=g).values[i] for i, g in enumerate(gold)])
    other = np.stack([logit.drop_sel(label=g).values[i, ..., 0] for i, g in enumerate(gold)])
    np.testing.assert_allclose(table.label_logit.values, (own - other).mean(axis=0), rtol=1e-5)
    for name in ("qk_auc", "qk_auc_content", "ov_auc"):
        np.testing.assert_array_equal(table[name].values, run.scores[name].values)
        assert table[name].attrs["long_name"]


def test_scores_are_made_where_a_run_lacks_them(run: xr.DataTree) -> None:
    without = run.copy()
    del without["scores"]
    xr.testing.assert_allclose(head_table(without), head_table(run))


@pytest.mark.parametrize("group", ["effects", "attribution", "scores"])
def test_one_dataset_is_enough(run: xr.DataTree, group: str) -> None:
    whole = head_table(run)
    for form in (run[group], run[group].to_dataset()):
        table = head_table(form)
        assert set(table) < set(whole) | {"margin_drop"}
        for name in table:
            xr.testing.assert_allclose(table[name], whole[name])


def test_what_is_no_run(run: xr.DataTree) -> None:
    for wrong in (None, 3, xr.Dataset(), xr.DataTree(), "run.zarr"):
        with pytest.raises(tt.errors.InputError, match="is not a run"):
            one_run(wrong)
    with pytest.raises(tt.errors.InputError, match="no numbers of heads; it has predictions"):
        head_table(run.predictions)
    with pytest.raises(tt.errors.InputError, match="neither qk nor ov"):
        prompt_view(run.effects, 0)


def test_parts() -> None:
    group = xr.DataTree.from_dict({"a/effects": xr.Dataset(), "b/effects": xr.Dataset()})
    group.attrs["twotower_parts"] = '["a", "b"]'
    with pytest.raises(tt.errors.InputError, match="several parts; choose one of a, b"):
        one_run(group)
    with pytest.raises(tt.errors.InputError, match="no part 'c'; parts are a, b"):
        one_run(group, "c")
    assert one_run(group, "b").name == "b"
    with pytest.raises(tt.errors.InputError, match="no part 'a'; it has none"):
        one_run(group["a"], "a")


def test_marked_heads(run: xr.DataTree) -> None:
    assert marked_heads(run, k=4) == tt.in_context_heads(run, 4)
    assert len(marked_heads(run)) == 12  # no more heads than there are
    named = run.copy()
    named.attrs["in_context_heads"] = "[[2, 1], [0, 3]]"
    assert marked_heads(named) == [(2, 1), (0, 3)]
    assert marked_heads(named, [(1, 1)]) == [(1, 1)]
    assert marked_heads(run.scores) == []


@pytest.mark.parametrize("keep", ["all", "labels"])
def test_prompt_view(llama: tt.Model, keep: str) -> None:
    prompts = tt.build_prompts(llama, THREE, shots=2, n=5, seed=3)
    run = tt.analyze(llama, prompts, keep=keep)
    for number in range(5):
        view = prompt_view(run, number)
        there = prompts.token_id[number] >= 0
        assert view.tokens.tolist() == prompts.token[number][there].tolist()
        assert view.roles.tolist() == prompts.role[number][there].tolist()
        assert view.positions.tolist() == list(range(1 - int(there.sum()), 1))
        assert view.gold == prompts.gold[number]
        full = tt.qk_similarity(llama, prompts).isel(prompt=number)
        own = view.of((2, 1))
        kept = there & ((prompts.role[number] == "label") if keep == "labels" else True)
        for name in ("attention", "score", "score_content"):
            expected = np.where(kept, full[name].values[2, 1], np.nan)[there]
            np.testing.assert_allclose(own[name], expected, rtol=1e-5, atol=1e-7)
        np.testing.assert_allclose(own["score_position"], own["score"] - own["score_content"])
        logits = tt.ov_labels(llama, prompts).label_logit.values[number, 2, 1]
        expected = np.where(kept[:, None], logits, np.nan)[there]
        np.testing.assert_allclose(own["label_logit"], expected, rtol=1e-4, atol=1e-6)
        assert view.answer["margin"] == pytest.approx(float(run.predictions.margin[number]))


def test_top_tokens_and_a_run_without_tokens(llama: tt.Model, prompts: tt.Prompts) -> None:
    ov = tt.ov_labels(llama, prompts, top_tokens=[(1, 2)])
    view = prompt_view(ov, 4)
    there = ov.role.values[4] != "pad"
    assert view.top_tokens["1.2"].tolist() == ov.top_token.values[4, 0][there].tolist()
    label = view.roles == "label"
    assert view.tokens[label].tolist() == ov.label_text.values[4][there][label].tolist()
    assert set(view.tokens[~label]) == {"·"}
    assert "attention" not in view.of((1, 2))
    assert view.answer == {}


def test_what_is_not_there(run: xr.DataTree) -> None:
    for number, words in ((6, "not in the run"), (-1, "prompt=-1"), ("0", "whole number")):
        with pytest.raises(tt.errors.InputError, match=words):
            prompt_view(run, number)
    with pytest.raises(tt.errors.InputError, match=r"no head 3\.0"):
        prompt_view(run, 0).of((3, 0))


def test_partly_measured_runs(run: xr.DataTree) -> None:
    marks = np.array([True, False, True, True, False, False])
    part = run.copy()
    for name in ("predictions", "effects", "attribution", "qk", "ov"):
        part[name] = part[name].to_dataset().assign_coords(measured=("prompt", marks))
    del part["scores"]
    kept = xr.DataTree.from_dict(
        {name: part[name].to_dataset(inherit=False).isel(prompt=marks) for name in part.children}
    )
    kept.attrs = part.attrs
    for dataset in (part, kept):
        for name in dataset.children:
            if "measured" in dataset[name].coords:
                assert dataset[name].measured.values.sum() == 3
    xr.testing.assert_allclose(head_table(part), head_table(kept))
    with pytest.raises(tt.errors.InputError, match="prompt 1 is not measured yet"):
        prompt_view(part, 1)
    assert prompt_view(part, 2).number == 2


def test_a_label_is_compared_with_the_mean_of_the_others(llama: tt.Model) -> None:
    prompts = tt.build_prompts(llama, THREE, shots=1, n=3, seed=0)
    logit = tt.attribution(llama, prompts).label_logit
    found = above_others(logit).values
    for i, gold in enumerate(prompts.gold):
        column = prompts.labels.index(gold)
        values = logit.values[i]
        others = np.delete(values, column, axis=-1).mean(axis=-1)
        np.testing.assert_allclose(found[i], values[..., column] - others, rtol=1e-4, atol=1e-6)


def test_a_single_head() -> None:
    from tiny import byte_level, hf_model

    model = hf_model("llama")
    config = model.config
    config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads = 1, 1, 1
    small = tt.load(type(model)(config).eval(), tokenizer=byte_level())
    run = tt.analyze(small, tt.build_prompts(small, TWO, shots=1, n=2))
    assert head_table(run).sizes == {"layer": 1, "head": 1}
    assert prompt_view(run, 1).of((0, 0))["attention"].sum() == pytest.approx(1, abs=1e-5)


def test_heads_in_another_order_are_the_same_heads(run: xr.DataTree) -> None:
    """As after isel(layer=[2, 0, 1]) of one group."""
    mixed = run.copy()
    mixed["qk"] = run.qk.to_dataset().isel(layer=[2, 0, 1], head=[3, 1, 0, 2])
    view, plain = prompt_view(mixed, 1), prompt_view(run, 1)
    for head in ((0, 1), (2, 3)):
        for name, values in plain.of(head).items():
            np.testing.assert_array_equal(view.of(head)[name], values)
    mixed["effects"] = run.effects.to_dataset().isel(layer=[2, 0, 1])
    xr.testing.assert_allclose(head_table(mixed), head_table(run))
    mixed["ov"] = run.ov.to_dataset().isel(layer=[0, 2])
    with pytest.raises(tt.errors.InputError, match="same heads"):
        prompt_view(mixed, 1)


def test_what_is_not_finite_is_not_marked(run: xr.DataTree) -> None:
    bad = run.copy()
    drop = run.effects.margin_drop.copy(deep=True)
    drop[0, 1, 1], drop[0, 0, 3] = np.nan, np.inf
    bad["effects"] = run.effects.to_dataset().assign(margin_drop=drop)
    assert len(marked_heads(bad)) == 11  # the mean leaves NaN out
    assert tt.Head(0, 3) not in marked_heads(bad)


def test_heads_are_given_as_heads(run: xr.DataTree) -> None:
    assert marked_heads(run, []) == []
    for wrong in ((0, 0), 5, ["a"], [(1,)], [(1, 2, 3)], [(0.0, 1)], "0.1"):
        with pytest.raises(tt.errors.InputError):
            marked_heads(run, wrong)
    for wrong in (None, 5, (1,), (1, 2, 3), "0.1", (0.0, 1), (-1, 0)):
        with pytest.raises(tt.errors.InputError):
            prompt_view(run, 0).of(wrong)


def test_scores_that_are_missing_are_made(run: xr.DataTree) -> None:
    """A run under way has scores of NaN."""
    part = run.copy()
    part["scores"] = run.scores.to_dataset() * np.nan
    part["scores"].attrs = run.scores.attrs
    xr.testing.assert_allclose(head_table(part), head_table(run))


def test_dims_that_are_gone(run: xr.DataTree) -> None:
    for change in (lambda r: r.tt.head(1, 1), lambda r: r.isel(prompt=0), lambda r: r.tt.mean_ci()):
        with pytest.raises(tt.errors.InputError):
            head_table(change(run))
        with pytest.raises(tt.errors.InputError):
            prompt_view(change(run), 0)
        with pytest.raises(tt.errors.InputError):
            change(run).tt.heads(1)


def test_groups_of_other_prompts(run: xr.DataTree, llama: tt.Model) -> None:
    mixed = run.copy()
    mixed["ov"] = run.ov.to_dataset().isel(prompt=[0, 2])
    assert prompt_view(mixed, 2).number == 2
    with pytest.raises(tt.errors.InputError, match="prompt 1"):
        prompt_view(mixed, 1)
    longer = tt.build_prompts(llama, TWO, shots=5, n=6, seed=3)
    mixed["ov"] = tt.ov_labels(llama, longer)
    with pytest.raises(tt.errors.InputError, match="different prompts"):
        prompt_view(mixed, 1)


def test_runs_that_hold_a_part(llama: tt.Model, prompts: tt.Prompts) -> None:
    """Figures and tables of one measure alone; what is not there is left out."""
    only = tt.analyze(llama, prompts, measures=["qk"])
    view = prompt_view(only, 0)
    assert view.answer == {}
    towers = tt.analyze(llama, prompts, measures=["qk", "ov"])
    assert "margin_drop" not in head_table(towers)
    axes = tt.figures.two_towers(towers)
    sizes = {float(s) for c in axes.collections for s in c.get_sizes()}
    assert len(sizes) == 1  # of no effect known
