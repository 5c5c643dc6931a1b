"""TransformerLens's bridge on the same weights: attention, heads' outputs, effects of knock-outs.

It needs an environment of its own (`make test-peers`); elsewhere these tests are skipped.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bridge import bridge_of, ids, zero
from tiny import ARCHITECTURES, FURTHER, THREE, hf_model

import twotower as tt

pytest.importorskip("transformer_lens", reason="TransformerLens is not installed here")
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module", params=[*ARCHITECTURES, *FURTHER])
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The model as twotower has it, prompts, and the bridge around the same weights."""
    folder: Path = tmp_path_factory.mktemp("lens") / request.param
    bridge = bridge_of(hf_model(request.param), folder)
    model = tt.load(str(folder))
    return model, tt.build_prompts(model, THREE, shots=2, n=2, seed=1), bridge


def test_attention_patterns(both) -> None:
    model, prompts, bridge = both
    found = tt.qk_similarity(model, prompts).attention.values
    for number in range(len(prompts)):
        _, cache = bridge.run_with_cache(ids(prompts, number))
        n = int(prompts.lengths[number])
        for layer in range(model.n_layers):
            pattern = cache[f"blocks.{layer}.attn.hook_pattern"][0, :, -1].numpy()
            np.testing.assert_allclose(found[number, layer, :, -n:], pattern, rtol=1e-3, atol=2e-5)


def test_head_outputs(both) -> None:
    """z of the last position through the output projection: label logits of the two agree."""
    model, prompts, bridge = both
    written = tt.attribution(model, prompts).label_logit.values
    labels = list(prompts.label_ids)
    norm = model.architecture.final_norm(model.module)
    unembedding = model.module.get_output_embeddings().weight[labels].double()
    for number in range(len(prompts)):
        end: list[torch.Tensor] = []
        handle = norm.register_forward_hook(lambda m, i, o, end=end: end.append(i[0]))
        with torch.no_grad():
            model.module(ids(prompts, number), use_cache=False)
        handle.remove()
        last = end[0][0, -1].double()
        centred = last - last.mean() if hasattr(norm, "normalized_shape") else last
        scale = (centred.pow(2).mean() + model.architecture.norm_epsilon).sqrt()
        _, cache = bridge.run_with_cache(ids(prompts, number))
        for layer in range(model.n_layers):
            z = cache[f"blocks.{layer}.attn.hook_z"][0, -1]
            z = z.reshape(model.n_heads, -1)
            projection = model.architecture.projection(
                model.architecture.layers(model.module)[layer]
            )
            for head in range(model.n_heads):
                alone = torch.zeros_like(z)
                alone[head] = z[head]
                with torch.no_grad():
                    zero = projection(torch.zeros_like(z).flatten()[None])
                    out = (projection(alone.flatten()[None]) - zero)[0].double()
                if hasattr(norm, "normalized_shape"):
                    out = out - out.mean()
                logit = unembedding @ (out * norm.weight.double() / scale)
                np.testing.assert_allclose(
                    written[number, layer, head], logit.numpy(), rtol=2e-3, atol=2e-4
                )


def test_single_head_effects(both) -> None:
    model, prompts, bridge = both
    found = tt.head_effects(model, prompts, positions="all").logprob_drop.values
    labels = list(prompts.label_ids)
    for number in range(len(prompts)):
        tokens = ids(prompts, number)
        with torch.no_grad():
            clean = bridge(tokens)[0, -1].log_softmax(-1)[labels]
        for layer in range(model.n_layers):
            for head in range(model.n_heads):
                name, hook = f"blocks.{layer}.attn.hook_z", zero(model.n_heads, head, slice(None))
                with torch.no_grad():
                    logits = bridge.run_with_hooks(tokens, fwd_hooks=[(name, hook)])
                drop = clean - logits[0, -1].log_softmax(-1)[labels]
                np.testing.assert_allclose(
                    found[number, layer, head], drop.numpy(), rtol=2e-3, atol=2e-4
                )
