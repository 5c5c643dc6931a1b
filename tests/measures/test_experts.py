"""Mixtures of experts: the MLP is read and called as a whole."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import TWO, byte_level
from transformers import MixtralConfig, MixtralForCausalLM

import twotower as tt


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> tt.Model:
    folder: Path = tmp_path_factory.mktemp("mixtral")
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=len(byte_level()), hidden_size=48, intermediate_size=64, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2,
        max_position_embeddings=256, sliding_window=None, initializer_range=0.2,
    )  # fmt: skip
    MixtralForCausalLM(config).save_pretrained(folder)
    byte_level().save_pretrained(folder)
    return tt.load(folder)


@pytest.mark.parametrize("positions", ["last", "labels", "all"])
def test_a_sweep_equals_single_knock_outs(mixtral: tt.Model, positions: str) -> None:
    prompts = tt.build_prompts(mixtral, TWO, shots=2, n=4)
    drops = tt.head_effects(mixtral, prompts, positions=positions).margin_drop
    clean = tt.predict(mixtral, prompts).margin
    for layer, head in ((0, 0), (1, 2), (2, 3)):
        edits = [tt.KnockOut([(layer, head)], positions=positions)]
        alone = clean - tt.predict(mixtral, prompts, edits=edits).margin
        found = drops.sel(layer=layer, head=head)
        scale = float(np.abs(clean).max())
        np.testing.assert_allclose(found.values, alone.values, atol=1e-5 * scale)
