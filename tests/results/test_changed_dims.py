"""Results whose dims were turned round, put in another order, selected or averaged away.

There are as many layers as heads, prompts and labels, so that mixing two dims up shows.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
import xarray as xr
from tiny import THREE, byte_level, with_random_weights
from transformers import LlamaConfig

import twotower as tt
from twotower.figures import head_table, prompt_view
from twotower.measures.agreement import agreement
from twotower.measures.group_effects import strongest_group

LABELS = ("foo", "bar", "map")


@pytest.fixture(scope="module")
def model() -> tt.Model:
    config = LlamaConfig(
        vocab_size=704,
        hidden_size=36,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=3,
        max_position_embeddings=256,
    )
    return tt.load(with_random_weights(config), tokenizer=byte_level(), check=False)


@pytest.fixture(scope="module")
def run(model: tt.Model) -> xr.DataTree:
    prompts = tt.build_prompts(model, THREE, labels=LABELS, shots=2, n=3, seed=0)
    found = tt.analyze(model, prompts)
    groups = tt.group_effects(model, prompts, [[(0, 0), (1, 1)], [(1, 2), (2, 2)], [(0, 1)]])
    found["groups"] = xr.DataTree(groups)
    return found


def group(run: xr.DataTree, name: str) -> xr.Dataset:
    return run.children[name].to_dataset(inherit=False)


QUESTIONS: dict[str, Callable[[xr.DataTree], Any]] = {
    "scores": tt.two_tower_scores,
    "table": head_table,
    "heads": lambda run: tt.in_context_heads(group(run, "effects"), 4),
    "writers": lambda run: tt.in_context_heads(group(run, "attribution"), 4, by="label_logit"),
    "heads of a label": lambda run: tt.in_context_heads(group(run, "effects"), 4, label="bar"),
    "bias": lambda run: tt.label_bias(run.children["predictions"], ["foo"] * 3),
    "group": lambda run: strongest_group(group(run, "groups"), 2),
    "agreement": lambda run: agreement(group(run, "effects"), group(run, "effects"), 4),
    "weighted": lambda run: run.tt.weighted(),
    "differences": lambda run: group(run, "ov").tt.logit_minus("foo", "bar"),
    "roles": lambda run: group(run, "qk").tt.roles("label"),
}


def changed(run: xr.DataTree, change: Callable[[xr.Dataset], xr.Dataset]) -> xr.DataTree:
    """A run with a change of the datasets that have the dims for it."""

    def where_possible(dataset: xr.Dataset) -> xr.Dataset:
        try:
            return change(dataset)
        except (ValueError, KeyError):
            return dataset

    groups = {path: node.to_dataset(inherit=False) for path, node in run.subtree_with_keys}
    return xr.DataTree.from_dict({path: where_possible(one) for path, one in groups.items()})


def turned(dataset: xr.Dataset) -> xr.Dataset:
    return dataset.transpose(*reversed(list(dataset.dims)))


@pytest.mark.parametrize("question", QUESTIONS)
@pytest.mark.parametrize(
    "change",
    [
        turned,
        lambda x: x.sortby(["layer", "head"], ascending=False),
        lambda x: x.sortby("prompt", ascending=False),
        lambda x: x.sortby("label"),
        lambda x: x.chunk(),
    ],
    ids=["turned", "heads backwards", "prompts backwards", "other labels first", "lazy"],
)
def test_order_does_not_matter(
    question: str, change: Callable[[xr.Dataset], xr.Dataset], run: xr.DataTree
) -> None:
    other = changed(run, change)
    expected, found = QUESTIONS[question](run), QUESTIONS[question](other)
    if not isinstance(expected, (xr.Dataset, xr.DataArray)):
        assert found == expected
        return
    found = found.reindex_like(expected)
    for name in expected if isinstance(expected, xr.Dataset) else [...]:
        one, two = expected[name], found[name].transpose(*expected[name].dims)
        if one.dtype.kind == "f":
            np.testing.assert_allclose(one, two, atol=1e-6)
        else:
            np.testing.assert_array_equal(one, two)


def test_nothing_is_changed_in_place(run: xr.DataTree) -> None:
    other = changed(run, turned)
    before = {name: node.to_dataset().copy(deep=True) for name, node in other.children.items()}
    for question in QUESTIONS.values():
        question(other)
    for name, dataset in before.items():
        xr.testing.assert_identical(other[name].to_dataset(), dataset)
        for variable in dataset:
            assert other[name][variable].dims == dataset[variable].dims


@pytest.mark.parametrize("question", QUESTIONS)
@pytest.mark.parametrize(
    "change",
    [
        lambda x: x.isel(layer=0),
        lambda x: x.isel(head=0),
        lambda x: x.isel(prompt=0),
        lambda x: x.isel(label=0),
        lambda x: x.isel(label=[1]),
        lambda x: x.mean("prompt", keep_attrs=True),
        lambda x: x.drop_vars("gold"),
        lambda x: x.drop_vars("role"),
        lambda x: x.expand_dims(seed=[0, 1]),
        lambda x: x.rename(layer="depth"),
    ],
    ids="layer head prompt label one-label mean gold role expanded renamed".split(),
)
def test_what_is_missing_is_told(
    question: str, change: Callable[[xr.Dataset], xr.Dataset], run: xr.DataTree
) -> None:
    """An answer, or a sentence that says what is missing; never an error of another library."""
    with suppress(tt.TwoTowerError):
        QUESTIONS[question](changed(run, change))


def test_the_view_of_a_prompt_with_a_label_selected(run: xr.DataTree) -> None:
    with pytest.raises(tt.errors.InputError, match="ov has no dim 'label'"):
        prompt_view(changed(run, lambda x: x.isel(label=0)), 0)


def test_labels_without_the_right_one(run: xr.DataTree) -> None:
    """Effects on prompts whose right answer was selected away would count as zero."""
    attribution = group(run, "attribution")
    left = sorted({*LABELS} - {str(attribution.gold[0].item())})
    with pytest.raises(tt.errors.InputError, match="is not among the labels"):
        tt.in_context_heads(attribution.sel(label=left), 2, by="label_logit")
    right = attribution.isel(prompt=attribution.gold.isin(left))
    assert tt.in_context_heads(right.sel(label=left), 2, by="label_logit")
    with pytest.raises(tt.errors.InputError, match="single label"):
        tt.label_bias(group(run, "predictions").sel(label=["foo"]), ["foo"] * 3)
    with pytest.raises(tt.errors.InputError, match="ov has a single label"):
        tt.two_tower_scores(changed(run, lambda x: x.isel(label=[0])))


def test_scores_of_joined_runs_are_those_of_all_prompts(run: xr.DataTree) -> None:
    """Two runs number their prompts alike, so that there are as many numbers as scored prompts."""

    def joined(*parts: xr.Dataset) -> xr.Dataset:
        if "prompt" not in parts[0].dims:
            return parts[0]
        return xr.concat(parts, "prompt", data_vars="minimal", coords="minimal", compat="override")

    two = xr.map_over_datasets(joined, run, changed(run, lambda x: x.isel(prompt=[0, 0, 0])))
    table = head_table(two)
    scores = tt.two_tower_scores(two)
    for name in ("qk_auc", "ov_auc"):
        np.testing.assert_array_equal(table[name], scores[name])
        assert not np.array_equal(scores[name], run["scores"][name])
    with pytest.raises(tt.errors.InputError, match="several prompts 0"):
        prompt_view(two, 0)
    assert "qk_auc" not in head_table(changed(run, lambda x: x.isel(prompt=[])))


@pytest.mark.parametrize("dim", ["prompt", "position"])
def test_positions_of_a_result_in_another_order(dim: str, model: tt.Model) -> None:
    prompts = tt.build_prompts(model, THREE, labels=LABELS, shots=2, n=3, seed=0)
    mask = tt.predict(model, prompts)["role"] == "label"
    expected = tt.head_effects(model, prompts, mask.values)
    found = tt.head_effects(model, prompts, mask.sortby(dim, ascending=False).T)
    xr.testing.assert_equal(found, expected)
    with pytest.raises(tt.errors.InputError, match=f"all values of '{dim}'"):
        tt.head_effects(model, prompts, mask.isel({dim: [0, *range(mask.sizes[dim] - 1)]}))


def test_a_changed_mask_does_not_change_an_edit(model: tt.Model) -> None:
    prompts = tt.build_prompts(model, THREE, labels=LABELS, shots=2, n=3, seed=0)
    mask = prompts.where("all")
    edit = tt.KnockOut([(0, 1)], mask)
    before = tt.predict(model, prompts, edit)
    mask[:] = False
    xr.testing.assert_equal(tt.predict(model, prompts, edit), before)
