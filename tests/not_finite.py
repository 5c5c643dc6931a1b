"""A float16 Llama that overflows on prompts with the word Rome, and the prompts that it can do."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np
import torch
import xarray as xr
from tiny import byte_level, hf_model

import twotower as tt
from twotower.results import measured_prompts

TASK = tt.Task(
    "overflowing",
    {
        "animal": ["cat", "dog", "owl", "cow", "hen", "ape"],
        "city": ["Paris", "Rome", "Oslo", "Kyoto", "Lima", "Cairo"],
    },
)


@cache
def model() -> tt.Model:
    """A random model in float16 of which one word overflows, in the first MLP.

    Feature 0 is 0 for all other words, so that nothing else comes near the largest number.
    """
    hf = hf_model("llama-grouped").half()
    (word,) = byte_level()("Rome", add_special_tokens=False)["input_ids"][-1:]
    layer = hf.model.layers[0]
    with torch.no_grad():
        hf.model.embed_tokens.weight[:, 0] = 0
        hf.model.embed_tokens.weight[word, 0] = 6e4
        layer.self_attn.o_proj.weight[0] = 0
        for projection in (layer.mlp.gate_proj, layer.mlp.up_proj):
            projection.weight[0] = 0
            projection.weight[0, 0] = 10
        layer.mlp.down_proj.weight[:, 0] = 0
        layer.mlp.down_proj.weight[0, 0] = 100
        layer.mlp.down_proj.weight[0, 1:] = 0
        layer.post_attention_layernorm.weight[0] = 1
    return tt.load(hf, tokenizer=byte_level())


@cache
def prompts(n: int = 16, shots: int = 1) -> tt.Prompts:
    """Prompts of which some hold the word."""
    return tt.build_prompts(model(), TASK, shots=shots, n=n, seed=3)


def holds(some: tt.Prompts) -> np.ndarray:
    """(prompt,) whether a prompt holds the word."""
    return np.array(["Rome" in text for text in some.strings])


@contextmanager
def unwarned() -> Iterator[None]:
    """Without the warning of prompts that are not finite."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", tt.errors.NotFiniteWarning)
        yield


def parts(result: Any) -> list[xr.Dataset]:
    """A dataset by itself, or those of a tree that hold values."""
    if isinstance(result, xr.DataTree):
        return [node.to_dataset(inherit=False) for node in result.children.values()]
    return [result]


def same_on_finite(found: Any, expected: Any, tolerance: float = 2e-2) -> None:
    """Whether a result, its missing prompts left out, is that of the finite prompts alone."""
    for one, other in zip(parts(found), parts(expected), strict=True):
        if one.attrs["twotower_group"] == "prompts":
            continue
        kept = measured_prompts(one)
        assert dict(kept.sizes) == dict(other.sizes) or "position" in one.dims
        width = other.sizes.get("position")
        if width is not None:  # the longest prompt may be a missing one
            kept = kept.isel(position=slice(kept.sizes["position"] - width, None))
        for name, values in other.data_vars.items():
            a, b = kept[name].values, values.values
            assert a.dtype == b.dtype, name
            if b.dtype.kind == "f":
                np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance, err_msg=str(name))
            else:
                np.testing.assert_array_equal(a, b, err_msg=str(name))


def is_missing(found: xr.Dataset, bad: np.ndarray) -> None:
    """Whether prompts are missing in every variable of a dataset."""
    assert found.attrs["not_finite"] == int(bad.sum())
    np.testing.assert_array_equal(found["finite"].values, ~bad)
    for name, array in found.data_vars.items():
        if "prompt" not in array.dims or name == "favoured":
            continue
        values = array.transpose("prompt", ...).values[bad]
        if values.dtype.kind == "f":
            assert np.isnan(values).all(), name
        else:
            assert (values == (-1 if values.dtype.kind == "i" else "")).all(), name
        assert values.dtype.kind != "b", name
