"""TransformerLens's bridge beside models of many families: attention and single knock-outs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from bridge import bridge_of, ids, zero
from families import family_model
from tiny import THREE
from verify import LARGEST, relative

import twotower as tt

pytest.importorskip("transformer_lens", reason="TransformerLens is not installed here")
pytestmark = pytest.mark.filterwarnings("ignore")

AGREE = (
    "afmoe apertus arcee bamba bloom codegen cohere cohere2 deepseek_v2 deepseek_v3 ernie4_5 "
    "ernie4_5_moe exaone4 falcon falcon+many falcon_h1 flex_olmo gemma gemma2 gemma3_text "
    "gemma4_text glm glm4 glm4_moe glm4_moe_lite gpt_bigcode gpt_neo gpt_oss granite granitemoe "
    "granitemoehybrid hunyuan_v1_dense jais2 jamba laguna lfm2 lfm2_moe llama4_text minimax_m2 "
    "ministral3 mixtral mpt mpt+plain nanochat nemotron olmo olmo2 olmo3 olmo_hybrid olmoe opt "
    "phi3 qwen2_moe qwen3_5_text qwen3_moe qwen3_next seed_oss smollm3 stablelm stablelm+plain "
    "starcoder2 vaultgemma xglm youtu"
).split()
"""Types of which TransformerLens has a bridge with the heads' attention and outputs."""


@pytest.fixture(scope="module", params=AGREE)
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The model as twotower has it, prompts, and the bridge around the same weights."""
    folder = tmp_path_factory.mktemp("lens") / request.param
    bridge = bridge_of(family_model(request.param), folder)
    model = tt.load(str(folder))
    return model, tt.build_prompts(model, THREE, shots=2, n=1, seed=1), bridge


def test_attention_patterns(both) -> None:
    model, prompts, bridge = both
    found = tt.qk_similarity(model, prompts).attention.values[0]
    _, cache = bridge.run_with_cache(ids(prompts, 0))
    for layer in range(model.n_layers):
        if heads := model.heads_in(layer):
            pattern = cache[f"blocks.{layer}.attn.hook_pattern"][0, :, -1].numpy()
            assert relative(found[layer, :heads], pattern) < LARGEST


def test_single_head_effects(both) -> None:
    """Of every head, set to zero at the last position."""
    model, prompts, bridge = both
    effects = tt.head_effects(model, prompts).logprob_drop.values[0]
    tokens, labels = ids(prompts, 0), list(prompts.label_ids)
    found, expected = [], []
    with torch.no_grad():
        clean = bridge(tokens)[0, -1].log_softmax(-1)[labels]
        for layer, head in model.heads:
            hook = zero(model.heads_in(layer), head, slice(-1, None))
            name = f"blocks.{layer}.attn.hook_z"
            logits = bridge.run_with_hooks(tokens, fwd_hooks=[(name, hook)])[0, -1]
            expected.append((clean - logits.log_softmax(-1)[labels]).numpy())
            found.append(effects[layer, head])
    assert relative(np.array(found), np.array(expected)) < LARGEST
