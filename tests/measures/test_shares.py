"""Shares of attention against a float64 forward, position by position."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import transformers
from reference import Reference, error, ids_of, real
from surface import under
from tiny import THREE, byte_level, hf_model, tiny

import twotower as tt
from twotower.measures.shares import SOURCES, attention_shares


def source_of(prompts: tt.Prompts, i: int, query: int, key: int) -> str:
    """What a key is to a query, both counted over the padded positions."""
    if query == key:
        return "itself"
    role = prompts.role[i, key]
    if role == "bos":
        return "bos"
    own = prompts.demonstration[i, query] == prompts.demonstration[i, key]
    if role in ("text", "query"):
        return "own text" if own else "other texts"
    if role == "label" and not own:
        return "other labels"
    return "own rest" if own else "other rest"


def by_hand(model: tt.Model, prompts: tt.Prompts, at: np.ndarray) -> np.ndarray:
    reference = Reference(model.module)
    found = np.zeros((len(prompts), model.n_layers, model.n_heads, len(SOURCES)))
    for i in range(len(prompts)):
        run, columns = reference.run(ids_of(prompts, i)), np.flatnonzero(real(prompts, i))
        looking = [q for q in range(len(columns)) if at[i, columns[q]]]
        for layer in range(model.n_layers):
            for q in looking:
                for k in range(q + 1):
                    kind = SOURCES.index(source_of(prompts, i, columns[q], columns[k]))
                    found[i, layer, :, kind] += run.attention[layer][:, q, k].numpy()
        found[i] /= len(looking)
    return found


@pytest.mark.parametrize("positions", ["labels", "last", "all"])
def test_against_float64(any_model: tt.Model, positions: str) -> None:
    prompts = tt.build_prompts(any_model, THREE, shots=1, n=3, seed=2)
    found = under(attention_shares, any_model, prompts, positions, batch_size=2)
    expected = by_hand(any_model, prompts, prompts.where(positions))
    assert found["share"].dims == ("prompt", "layer", "head", "source")
    assert error(found["share"], expected) <= 1e-5
    np.testing.assert_allclose(found["share"].sum("source"), 1, atol=1e-5)


def test_bos_and_picked_positions() -> None:
    model = tt.load(hf_model("llama"), tokenizer=byte_level(bos=True))
    prompts = tt.build_prompts(model, THREE, shots=1, n=3, seed=2)
    picked = tt.at(role="label", demonstration=1)
    found = attention_shares(model, prompts, picked)
    assert error(found["share"], by_hand(model, prompts, picked.mask(prompts))) <= 1e-5
    assert float(found["share"].sel(source="bos").min()) > 0


def test_a_prompt_in_which_nothing_looks_is_nan() -> None:
    model = tiny("gpt2")
    prompts = tt.build_prompts(model, THREE, shots=1, n=3, seed=2)
    at = prompts.where("labels").copy()
    at[1] = False
    found = attention_shares(model, prompts, at)["share"]
    assert np.isnan(found.values[1]).all()
    assert np.isfinite(found.values[[0, 2]]).all()
    with pytest.raises(tt.errors.InputError, match="no position attends"):
        attention_shares(model, prompts, np.zeros_like(at))


def test_attention_of_label_positions_alone_is_proved() -> None:
    """Heads that attend otherwise at one position, which no other proof looks at."""
    module = tt.load(hf_model("llama-grouped"), tokenizer=byte_level())
    prompts = tt.build_prompts(module, THREE, shots=3, n=1)
    column = int(np.flatnonzero(prompts.where("labels")[0])[0]) - prompts.n_positions
    attend = transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS

    def other(module: Any, query: torch.Tensor, *given: Any, **more: Any) -> Any:
        query = query.clone()
        if query.shape[2] >= -column:  # not where one token is probed
            query[:, :, column] *= 1.2
        return attend["sdpa"](module, query, *given, **more)

    attend.register("other_label", other)
    masks = transformers.masking_utils.ALL_MASK_ATTENTION_FUNCTIONS
    masks.register("other_label", masks["sdpa"])
    module.module.set_attn_implementation("other_label")
    tt.predict(module, prompts)
    with pytest.raises(tt.errors.CheckError, match="attention recomputed"):
        attention_shares(module, prompts)
