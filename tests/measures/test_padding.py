"""Padding: what counts columns instead of tokens, or sees later positions, is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from tiny import ANIMALS, CITIES, byte_level, hf_model

import twotower as tt
from twotower.models import Model

LONG = tt.Task("long", {"animal": ANIMALS, "city": [f"the city of {city}" for city in CITIES]})


def load(module: torch.nn.Module) -> Model:
    return tt.load(module.eval(), tokenizer=byte_level())


def small(kind: str, **settings: Any) -> torch.nn.Module:
    about = {
        "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 3, "vocab_size": 400,
        "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 0,
        "eos_token_id": 0,
    }  # fmt: skip
    config = transformers.AutoConfig.for_model(kind, **{**about, **settings})
    torch.manual_seed(0)
    module = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for weight in module.parameters():
            if weight.dim() > 1:
                weight.mul_(5)
    return module


def margins(module: torch.nn.Module, prompts: tt.Prompts) -> np.ndarray:
    """Margins of every prompt by itself."""
    found = []
    for ids, gold in zip(prompts.token_id, prompts.gold_index, strict=True):
        with torch.no_grad():
            logits = module(torch.tensor(ids[ids >= 0])[None], use_cache=False).logits
        labels = logits[0, -1, list(prompts.label_ids)].double().numpy()
        found.append(labels[gold] - np.delete(labels, gold).max())
    return np.array(found)


def one_at_a_time(model: Model, prompts: tt.Prompts) -> np.ndarray:
    with tt.set_options(batch_size=1):
        return tt.predict(model, prompts).margin.values


def test_a_hook_that_mixes_prompts_of_one_length() -> None:
    model = load(hf_model("llama-grouped"))
    prompts = tt.build_prompts(model, LONG, shots=1, n=12)
    lengths, counts = np.unique(prompts.lengths, return_counts=True)
    alike = prompts[prompts.lengths == lengths[counts.argmax()]]
    assert len(alike) > 1
    embedding = model.module.get_input_embeddings()
    embedding.register_forward_hook(lambda module, given, out: out - out.mean(0) / 2)
    for measure in (tt.predict, tt.head_effects):
        with pytest.raises(tt.errors.CheckError, match="mixes prompts.*batch_size=1"):
            measure(model, alike)
    expected = margins(model.module, alike)
    np.testing.assert_allclose(one_at_a_time(model, alike), expected, atol=1e-4)


def test_a_shorter_context_after_loading() -> None:
    """Rotary embeddings that depend on the longest earlier prompt are not measured beyond it."""
    model = load(hf_model("llama-grouped"))
    prompts = tt.build_prompts(model, LONG, shots=2, n=2)
    model.module.config.max_position_embeddings = 16
    with pytest.raises(tt.errors.InputError, match="the model takes 16"):
        tt.predict(model, prompts)


def test_a_hook_that_counts_columns() -> None:
    model = load(hf_model("llama-grouped"))
    prompts = tt.build_prompts(model, LONG, shots=2, n=4)
    assert len(set(prompts.lengths)) > 1
    tt.predict(model, prompts)

    def hook(module: Any, given: Any, out: torch.Tensor) -> torch.Tensor:
        out = out.clone()
        out[:, 2:3] *= 3
        return out

    model.module.get_input_embeddings().register_forward_hook(hook)
    measures: list[Callable[[], Any]] = [
        lambda: tt.predict(model, prompts),
        lambda: tt.head_effects(model, prompts),
        lambda: tt.complete(model, prompts, 2),
    ]
    for measure in measures:
        with pytest.raises(tt.errors.CheckError, match=r"padded from .*batch_size=1"):
            measure()
    found = one_at_a_time(model, prompts)
    np.testing.assert_allclose(found, margins(model.module, prompts), rtol=0, atol=1e-4)


def test_rotary_tables_that_change_with_the_longest_prompt() -> None:
    """Short prompts are right by themselves, and refused beside one beyond the length."""
    factors = {"short_factor": [1.0] * 6, "long_factor": [4.0] * 6}
    rope: dict[str, Any] = {"rope_type": "longrope", "rope_theta": 1e4, **factors}
    settings = {"original_max_position_embeddings": 40, "max_position_embeddings": 160}
    rope |= {"original_max_position_embeddings": 40, "factor": 4.0}
    module = small("phi3", rope_parameters=rope, **settings)
    model = load(module)
    few = tt.build_prompts(model, LONG, shots=1, n=4)
    texts = [*few.strings[:3], "cat: foo\n" * 12 + "dog:"]
    prompts = tt.contrast(model, texts, [" foo"] * 4, [" bar"] * 4)
    assert prompts.lengths[:3].max() < 40 < prompts.lengths[3]
    tt.predict(model, prompts[:3])
    with pytest.raises(tt.errors.CheckError, match="padded from"):
        tt.predict(model, prompts)
    found = one_at_a_time(model, prompts)
    expected = []
    for i in range(4):
        ids = torch.tensor(prompts.token_id[i][prompts.token_id[i] >= 0])[None]
        with torch.no_grad():
            logits = module(ids, use_cache=False).logits[0, -1]
        right, wrong = (byte_level()(x)["input_ids"][-1] for x in (" foo", " bar"))
        expected.append(float(logits[right] - logits[wrong]))
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)
    # The tables follow the last prompt, and are no change of the weights.
    short, long = (tt.predict(model, prompts[[i]]).attrs for i in (0, 3))
    assert short["weights_hash"] == long["weights_hash"]
    assert json.loads(long["changed_since_loading"]) == []


def test_a_model_whose_positions_see_later_ones() -> None:
    model = load(hf_model("llama-grouped"))
    prompts = tt.build_prompts(model, LONG, shots=2, n=4)
    tt.predict(model, prompts)
    model.config.is_causal = False
    model.module.set_attn_implementation("sdpa")
    for layer in model.module.model.layers:
        layer.self_attn.is_causal = False
    with pytest.raises(tt.errors.CheckError, match="positions see later ones"):
        one_at_a_time(model, prompts)


def test_attention_of_another_kind_before_the_last_query() -> None:
    model = load(hf_model("llama-grouped"))
    prompts = tt.build_prompts(model, LONG, shots=2, n=4)
    tt.predict(model, prompts)
    attend = transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS

    def other(module: Any, query: torch.Tensor, *given: Any, **more: Any) -> Any:
        earlier = query.clone()
        earlier[:, :, :-1] *= 1.2
        return attend["sdpa"](module, earlier, *given, **more)

    attend.register("other_scale", other)
    transformers.masking_utils.ALL_MASK_ATTENTION_FUNCTIONS.register(
        "other_scale", transformers.masking_utils.ALL_MASK_ATTENTION_FUNCTIONS["sdpa"]
    )
    model.module.set_attn_implementation("other_scale")
    for measure in (tt.measures.shares.attention_shares, tt.head_effects, tt.predict):
        with pytest.raises(tt.errors.CheckError, match="attention recomputed"):
            measure(model, prompts)


def test_padding_that_is_not_finite() -> None:
    model = load(hf_model("llama-grouped"))
    prompts = tt.build_prompts(model, LONG, shots=2, n=4)
    table = model.module.get_input_embeddings().weight
    table.data[model.tokenizer.pad_token_id] = torch.inf
    with pytest.raises(tt.errors.CheckError, match="padded from"):
        tt.predict(model, prompts)
    found = one_at_a_time(model, prompts)
    np.testing.assert_allclose(found, margins(model.module, prompts), rtol=0, atol=1e-4)


def test_a_hook_that_needs_several_tokens() -> None:
    model = load(hf_model("llama-grouped"))
    prompts = tt.build_prompts(model, LONG, shots=2, n=2)

    def hook(module: Any, given: Any, out: torch.Tensor) -> None:
        out[:, 2].abs().max()

    model.module.get_input_embeddings().register_forward_hook(hook)
    found = tt.head_effects(model, prompts)
    again = tt.head_effects(load(hf_model("llama-grouped")), prompts)
    np.testing.assert_allclose(found.margin_drop, again.margin_drop, rtol=0, atol=1e-5)
