"""What must hold of every model and every set of prompts."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from settings import examples
from surface import under
from tiny import ARCHITECTURES, THREE, TWO, byte_level, hf_model, tiny

import twotower as tt

NAMES = st.sampled_from(ARCHITECTURES)
HEADS = [tt.Head(layer, head) for layer in range(3) for head in range(4)]
FLOATS = {"rtol": 2e-4, "atol": 2e-5}


@st.composite
def some_prompts(draw: Any, name: str, least: int = 2) -> tt.Prompts:
    """Prompts of unequal length for a tiny model."""
    task = draw(st.sampled_from([TWO, THREE]))
    return tt.build_prompts(
        tiny(name),
        task,
        shots=draw(st.integers(1, 3)),
        n=draw(st.integers(least, 6)),
        seed=draw(st.integers(0, 2**31)),
        order=draw(st.sampled_from(["shuffled", "alternating", "blocked"])),
    )


@st.composite
def model_and_prompts(draw: Any, least: int = 2) -> tuple[tt.Model, tt.Prompts]:
    name = draw(NAMES)
    return tiny(name), draw(some_prompts(name, least))


def alike(one: xr.DataTree, other: xr.DataTree) -> None:
    for name, node in one.children.items():
        for variable, array in node.data_vars.items():
            if array.dtype.kind == "f":
                scale = float(np.nanmax(np.abs(array.values)))
                np.testing.assert_allclose(
                    other[name][variable].values / scale,
                    array.values / scale,
                    atol=2e-5,
                    err_msg=f"{name}.{variable}",
                )


@examples(7)
@given(both=model_and_prompts())
def test_weighted_value_output_vectors_sum_to_the_heads_output(both) -> None:
    model, prompts = both
    run = tt.analyze(model, prompts)
    summed = run.tt.weighted().sum("position").transpose("prompt", "layer", "head", "label")
    np.testing.assert_allclose(summed.values, run.attribution.label_logit.values, **FLOATS)
    np.testing.assert_allclose(run.qk.attention.sum("position").values, 1, atol=1e-5)


@examples(7)
@given(both=model_and_prompts(), data=st.data())
def test_results_do_not_depend_on_company_order_or_padding(both, data: Any) -> None:
    model, prompts = both
    whole = tt.analyze(model, prompts)
    order = data.draw(st.permutations(range(len(prompts))))
    size = data.draw(st.integers(1, len(prompts)))
    turned = under(tt.analyze, model, prompts[list(order)], batch_size=size)
    back = turned.isel(prompt=np.argsort(order))
    alike(whole.drop_nodes("scores"), back.drop_nodes("scores"))
    # Alone, a prompt has no padding at all; positions are counted from the end.
    number = data.draw(st.integers(0, len(prompts) - 1))
    alone = tt.analyze(model, prompts[[number]])
    for name, variable in (("qk", "score"), ("qk", "attention"), ("ov", "label_logit")):
        own = alone[name][variable]
        among = whole[name][variable].isel(prompt=[number]).sel(position=own.position)
        scale = float(np.abs(own).max())
        np.testing.assert_allclose(among.values / scale, own.values / scale, atol=2e-5)
        rest = whole[name][variable].isel(prompt=number)
        rest = rest.sel(position=rest.position < own.position[0])
        assert np.isnan(rest.values).all()


@cache
def swapped(name: str) -> tt.Model:
    """The tiny model, with the words foo and bar exchanged in all that it reads and says."""
    module = hf_model(name)
    tokenizer = byte_level()
    ids = [tokenizer.encode(f" {word}", add_special_tokens=False)[-1] for word in ("foo", "bar")]
    tables = {
        id(x): x
        for table in (module.get_input_embeddings(), module.get_output_embeddings())
        for x in (table.weight, getattr(table, "bias", None))
        if x is not None
    }
    with torch.no_grad():
        for weight in tables.values():
            weight[ids] = weight[ids[::-1]]
    return tt.load(module, tokenizer=tokenizer)


@examples(6)
@given(name=NAMES, seed=st.integers(0, 2**31), shots=st.integers(1, 3))
def test_labels_are_names(name: str, seed: int, shots: int) -> None:
    """A model to which foo is bar, shown foo for bar, does what the model did."""
    model = tiny(name)
    prompts = tt.build_prompts(model, TWO, shots=shots, n=4, seed=seed)
    before = tt.analyze(model, prompts)
    after = tt.analyze(swapped(name), prompts.reversed_labels())
    for group in ("predictions", "effects", "attribution", "qk", "ov"):
        for variable, array in before[group].data_vars.items():
            if array.dtype.kind != "f":
                continue
            found = after[group][variable]
            if "label" in array.dims:
                found = found.sel(label=["bar", "foo"])
            scale = float(np.nanmax(np.abs(array.values)))
            np.testing.assert_allclose(
                found.values / scale, array.values / scale, atol=2e-5, err_msg=str(variable)
            )
    for score in ("qk_auc", "ov_auc"):
        np.testing.assert_allclose(
            after.scores[score].values, before.scores[score].values, atol=0.05
        )


@examples(36)
@given(
    drop=arrays.arrays(
        np.float32,
        st.tuples(st.integers(1, 4), st.integers(1, 3), st.integers(1, 4)),
        elements=st.floats(-10, 10, width=32),
    )
)
def test_a_larger_k_only_adds_heads(drop: np.ndarray) -> None:
    from twotower.results import make_dataset

    n, layers, heads = drop.shape
    coordinates = {
        "prompt": np.arange(n),
        "layer": np.arange(layers),
        "head": np.arange(heads),
        "gold": np.array(["foo"] * n, dtype=object),
        "query_class": np.array(["x"] * n, dtype=object),
    }
    effects = make_dataset("effects", {"margin_drop": drop}, coordinates, {})
    every = tt.in_context_heads(effects, layers * heads)
    mean = drop.mean(axis=0)
    assert len(set(every)) == layers * heads
    assert [mean[head] for head in every] == sorted(mean.ravel(), reverse=True)
    for k in range(1, layers * heads):
        assert tt.in_context_heads(effects, k) == every[:k]


SOME = st.lists(st.sampled_from(HEADS), min_size=1, max_size=4, unique=True)


def answers(model: tt.Model, prompts: tt.Prompts, *edits: Any) -> np.ndarray:
    found: np.ndarray = tt.predict(model, prompts, list(edits)).logit.values
    return found


@examples(7)
@given(both=model_and_prompts(), heads=SOME, where=st.sampled_from(["all", "last", "labels"]))
def test_edits_compose(both, heads: list[tt.Head], where: str) -> None:
    model, prompts = both
    together = answers(model, prompts, tt.KnockOut(heads, positions=where))
    apart = answers(model, prompts, *(tt.KnockOut([head], positions=where) for head in heads))
    turned = [tt.KnockOut([head], positions=where) for head in reversed(heads)]
    np.testing.assert_array_equal(together, apart)
    np.testing.assert_array_equal(together, answers(model, prompts, *turned))
    scaled = answers(model, prompts, tt.KnockOut(heads, where, to=tt.Times(0.0)))
    np.testing.assert_allclose(scaled, together, **FLOATS)
    clean = answers(model, prompts)
    np.testing.assert_allclose(
        answers(model, prompts, tt.KnockOut(heads, "all", to=tt.Times(1.0))), clean, **FLOATS
    )


@examples(7)
@given(both=model_and_prompts(), heads=SOME)
def test_edits_that_change_nothing(both, heads: list[tt.Head]) -> None:
    model, prompts = both
    clean = answers(model, prompts)
    keys = tt.at(role="label")
    for edit in (
        tt.ScaleAttention(heads, 1.0, keys=keys),
        tt.ScaleAttention(heads, 1.0, keys=keys, renormalize=True),
        tt.KnockOut(heads, "last", to=tt.From(prompts)),
        tt.Patch(heads, prompts, what="attention"),
        tt.Patch(heads, prompts, what="values"),
    ):
        np.testing.assert_allclose(answers(model, prompts, edit), clean, **FLOATS)


@examples(6)
@given(
    both=model_and_prompts(), head=st.sampled_from(HEADS), where=st.sampled_from(["last", "all"])
)
def test_the_sweep_is_one_knock_out_after_the_other(both, head: tt.Head, where: str) -> None:
    model, prompts = both
    swept = tt.head_effects(model, prompts, positions=where, logprobs=False).margin_drop
    clean, out = (
        tt.predict(model, prompts, edits).margin.values
        for edits in ([], [tt.KnockOut([head], positions=where)])
    )
    found = swept.sel(layer=head.layer, head=head.head).values
    np.testing.assert_allclose(found, clean - out, rtol=1e-3, atol=1e-4)


@examples(6)
@given(both=model_and_prompts(), heads=SOME)
def test_what_is_knocked_out_no_longer_matters(both, heads: list[tt.Head]) -> None:
    """Once a head is out, editing its attention or taking it out again changes nothing."""
    model, prompts = both
    out = tt.KnockOut(heads, positions="all")
    edit = tt.ScaleAttention(heads, 3.0, keys=tt.at(role="label"))
    first = answers(model, prompts, out)
    np.testing.assert_allclose(answers(model, prompts, out, edit), first, **FLOATS)
    with pytest.raises(tt.errors.InputError):
        answers(model, prompts, out, tt.KnockOut(heads[:1], positions="all"))
