"""Lengths at which attention changes are proved at load; large scores are no fault."""

from __future__ import annotations

import pytest
import torch
from tiny import TWO, byte_level, hf_model
from transformers import AutoModelForCausalLM, LlamaConfig, Ministral3Config, MistralConfig

import twotower as tt
from twotower.models import registry
from twotower.models.families.llama import Llama
from twotower.models.lengths import check_lengths, named_lengths
from twotower.models.shrink import random_small_model, shrunk

SMALL = {
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "vocab_size": 704,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 0,
}


def made(config: object) -> torch.nn.Module:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


def test_the_lengths_that_a_configuration_names() -> None:
    assert named_lengths(LlamaConfig(**SMALL)) == {}
    assert named_lengths(MistralConfig(**SMALL, sliding_window=4096)) == {"sliding_window": 4096}
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    dynamic = LlamaConfig(**SMALL, rope_parameters=rope, max_position_embeddings=512)
    assert named_lengths(dynamic) == {"max_position_embeddings": 512}


def test_queries_scaled_beyond_a_context_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seven tokens show nothing of it; the configuration names the context."""
    wrong = type("NoFactor", (Llama,), {"model_types": ("ministral3",)})
    monkeypatch.setattr(registry, "ADAPTERS", [wrong])
    with pytest.raises(tt.errors.CheckError, match="original_max_position_embeddings.*layer 0"):
        tt.load(made(Ministral3Config(**SMALL)), tokenizer=byte_level())


@pytest.mark.parametrize("window", [16, 4096])
def test_a_window_is_proved_however_long(window: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tt.load(made(MistralConfig(**SMALL, sliding_window=window)), tokenizer=byte_level())
    assert all(one.strain <= 1 for one in check_lengths(model).values())
    assert "attention" in check_lengths(model)
    wrong = type("NoWindow", (Llama,), {"window": lambda self, layer: None})
    monkeypatch.setattr(registry, "ADAPTERS", [wrong])
    with pytest.raises(tt.errors.CheckError, match="sliding_window"):
        tt.load(made(MistralConfig(**SMALL, sliding_window=window)), tokenizer=byte_level())


def test_a_small_model_keeps_the_kinds_of_layers() -> None:
    kinds = ["full_attention", *["sliding_attention"] * 4, "full_attention"]
    config = MistralConfig(**{**SMALL, "num_hidden_layers": 6, "num_attention_heads": 32})
    config.num_key_value_heads, config.layer_types = 8, kinds
    small = shrunk(config, {"sliding_window": 8})
    assert small.layer_types == ["full_attention", "sliding_attention"]
    assert small.num_hidden_layers == 2
    assert small.num_attention_heads // small.num_key_value_heads == 4
    assert small.sliding_window == 8
    assert config.num_hidden_layers == 6  # the model's own is left as it is


def test_the_global_random_state_is_left() -> None:
    before = torch.get_rng_state()
    random_small_model(shrunk(LlamaConfig(**SMALL)))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_large_scores_are_no_fault(attention: str) -> None:
    """float32 rounds a score of 3,000 by 2e-4; heads are read right all the same."""
    module = hf_model("llama", attention)
    for layer in module.model.layers:
        layer.self_attn.q_proj.weight.mul_(40)
        layer.self_attn.k_proj.weight.mul_(40)
    model = tt.load(module, tokenizer=byte_level())
    prompts = tt.build_prompts(model, TWO, shots=3, n=4, seed=1)
    scores = tt.qk_similarity(model, prompts).score
    assert abs(scores).max() > 1000
    tt.head_effects(model, prompts)


def test_a_configuration_that_returns_tuples() -> None:
    module = hf_model("llama")
    module.config.return_dict = False
    model = tt.load(module, tokenizer=byte_level())
    prompts = tt.build_prompts(model, TWO, shots=2, n=2, seed=1)
    same = tt.load(hf_model("llama"), tokenizer=byte_level())
    found, expected = (tt.predict(one, prompts).logit.values for one in (model, same))
    assert (found == expected).all()
    assert module.config.return_dict is False
