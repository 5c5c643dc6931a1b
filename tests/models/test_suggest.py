"""Adapters found by `twotower check --suggest`, for families whose own adapters are taken away."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from command import run as command
from tiny import THREE, byte_level
from transformers import AutoConfig, AutoModelForCausalLM

import twotower as tt
from twotower.models import families, registry
from twotower.models.suggest import suggest

SMALL = {"num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 704, "pad_token_id": 0}
FAMILIES = {
    "ernie4_5": {"num_key_value_heads": 2, "head_dim": 16, "use_bias": True},
    "phi3": {"num_key_value_heads": 2, "bos_token_id": 0, "eos_token_id": 0},
    "olmo2": {"num_key_value_heads": 4},
    "gpt_neox": {"use_parallel_residual": False},
}
"""Interleaved rotary, one projection, norms after and over the whole width, one projection by
head."""


def config_of(name: str, **more: object) -> object:
    sizes = {"hidden_size": 64, "intermediate_size": 96, "max_position_embeddings": 256}
    return AutoConfig.for_model(name, **SMALL, **sizes, **FAMILIES[name], **more)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_without_adapter(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    config = config_of(name)
    module = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    known = tt.load(module, tokenizer=byte_level())
    prompts = tt.build_prompts(known, THREE, shots=1, n=2, seed=1)
    expected = tt.head_effects(known, prompts).margin_drop
    monkeypatch.setattr(registry, "ADAPTERS", [])
    text = suggest(config)
    # As in the package, where the file is found by itself.
    (tmp_path / "found.py").write_text(text)
    monkeypatch.setattr(families, "__path__", [str(tmp_path)])
    monkeypatch.setitem(sys.modules, "twotower.models.families.found", None)
    del sys.modules["twotower.models.families.found"]
    (found,) = families._adapters()
    assert found.model_types == (name,)
    tt.models.register(found)
    model = tt.load(module, tokenizer=byte_level())
    drops = tt.head_effects(model, prompts).margin_drop
    np.testing.assert_allclose(drops, expected, rtol=1e-4, atol=1e-6)


def test_nothing_is_suggested_where_nothing_is_right(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Granite's multipliers are not among the choices."""
    config = AutoConfig.for_model("granite", **SMALL, hidden_size=64, residual_multiplier=0.3)
    config.save_pretrained(tmp_path)
    assert command("check", tmp_path, "--suggest") == 2
    assert "nothing to suggest for 'granite': no choice of" in capsys.readouterr().err


def test_the_kind_of_a_configuration(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    AutoConfig.for_model("gemma2").save_pretrained(tmp_path)
    assert command("check", tmp_path, "--shape") == 0
    out = capsys.readouterr().out
    assert "Gemma2" in out
    assert "All hold. Models of this kind are supported." in out
    AutoConfig.for_model("mamba").save_pretrained(tmp_path)
    assert command("check", tmp_path, "--shape") == 2
    assert "it has no heads that attend by softmax" in capsys.readouterr().err
