"""Parts of scores and of what heads write: they sum to the whole, and each is what it says."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from families import ALONE, family_model
from tiny import TWO, byte_level, tiny
from verify_edges import Paths

import twotower as tt

FAMILIES = ("gemma2", "olmo2", "gpt2", "deepseek_v3", "gemma4_text+all", "qwen3_next")
SLOW = (
    "exaone4",
    "gpt_oss",
    "falcon+newalibi",
    "falcon+multi",
    "cohere2_moe",
    "falcon_h1",
    "laguna",
    "llama4+wrapped",
    "granite",
    "nemotron_h",
    "minicpm3",
    "hunyuan_v1_dense",
    "phi3",
    "gptj",
    "stablelm",
    "persimmon",
    "beam",
)


@pytest.fixture(autouse=True)
def _one_at_a_time(request: pytest.FixtureRequest) -> Iterator[None]:
    """Models that count padding are measured a prompt at a time."""
    callspec = getattr(request.node, "callspec", None)
    alone = callspec is not None and callspec.params.get("name") in ALONE
    with tt.set_options(batch_size=1 if alone else None):
        yield


def prompts_for(name: str) -> tuple[tt.Model, tt.Prompts, list[tt.Head]]:
    model = tt.load(family_model(name), tokenizer=byte_level())
    prompts = tt.build_prompts(model, TWO, shots=2, n=2, seed=0)
    assert len(set(prompts.lengths)) == 2
    top = max(head.layer for head in model.heads)
    return model, prompts, [head for head in model.heads if head.layer == top][:2]


def close(found: Any, expected: Any) -> None:
    found, expected = np.asarray(found), np.asarray(expected)
    assert (np.isnan(found) == np.isnan(expected)).all()
    assert np.nanmax(abs(found - expected)) < 1e-4 * np.nanmax(abs(expected))


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(
    "name", [*FAMILIES, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]
)
def test_sums(name: str) -> None:
    model, prompts, heads = prompts_for(name)
    found = tt.score_parts(model, prompts, heads, keep="all", pairs=True)
    qk = tt.qk_similarity(model, prompts)

    def of_heads(array: Any) -> np.ndarray:
        return np.stack([array.sel(layer=h.layer, head=h.head).values for h in heads], axis=1)

    cap = model.architecture.score_softcap
    whole = found.score if cap is None else cap * np.tanh(found.score / cap)
    if "alibi" not in name:  # the score of QK has its bias
        close(whole, of_heads(qk.score))
    close(found.query_part.sum("source", skipna=False), found.score)
    close(found.key_part.sum("source", skipna=False), found.score)
    close(found.score_part.sum("key_source", skipna=False), found.query_part)
    content = found.query_part_content.sum("source", skipna=False)
    close(content if cap is None else cap * np.tanh(content / cap), of_heads(qk.score_content))
    written = tt.margin_parts(model, prompts, heads)
    logits = tt.attribution(model, prompts).label_logit.transpose(..., "label").values
    rows, gold = np.arange(2), prompts.gold_index
    own = np.stack([logits[:, h.layer, h.head] for h in heads], axis=1)
    close(written.written, own[rows, :, gold] - own[rows, :, 1 - gold])
    close(written.margin_part.sum(("source", "position")), written.written)
    assert "parts" in found.attrs["proof"]


@pytest.mark.usefixtures("one_thread")
def test_each_part() -> None:
    """In a Llama, against its weights: one source's write, through norm, projection and rotary."""
    model, prompts, heads = prompts_for("llama")
    found = tt.score_parts(model, prompts, heads, keep="labels")
    written = tt.margin_parts(model, prompts, heads, keep="labels")
    for number in range(2):
        one = Paths(model, prompts, number)
        layer, attention = heads[0].layer, one.blocks[heads[0].layer].self_attn
        norm = one.blocks[layer].input_layernorm
        stream = one.streams[layer].double()
        scale = (
            norm.weight / (stream.square().mean(-1, keepdim=True) + norm.variance_epsilon).sqrt()
        )
        cos, sin = one.module.model.rotary_emb(stream.float(), torch.arange(stream.shape[1])[None])
        at = np.flatnonzero(one.at_labels)
        groups = attention.q_proj.out_features // attention.k_proj.out_features

        def project(
            x: torch.Tensor, module: Any, turned: bool = True, biased: bool = False
        ) -> torch.Tensor:
            out = (x.double() * scale) @ module.weight.double().T
            out = out + module.bias if biased and module.bias is not None else out
            out = out.unflatten(-1, (-1, model.d_head))[0]
            if not turned:
                return out
            half = model.d_head // 2
            rotated = torch.cat((-out[..., half:], out[..., :half]), dim=-1)
            return out * cos[0, :, None] + rotated * sin[0, :, None]

        for head in heads:
            own = head.head // groups
            key = project(stream, attention.k_proj, biased=True)[at, own]
            query = project(stream, attention.q_proj, biased=True)[-1, head.head]
            for source in ("embedding", "0.1", "mlp 1", "1.3"):
                write = one.writes(source)
                parts = found.sel(source=source, chosen=str(head)).isel(prompt=number)
                expected = key @ project(write, attention.q_proj)[-1, head.head]
                close(parts.query_part, (expected * model.architecture.scaling(layer)).detach())
                expected = project(write, attention.k_proj)[at, own] @ query
                close(parts.key_part, (expected * model.architecture.scaling(layer)).detach())
                value = project(write, attention.v_proj, turned=False)[at, own]
                weight = attention.o_proj.weight.double().T.unflatten(0, (-1, model.d_head))
                final = one.module.model.norm
                pulled = value @ weight[head.head] * final.weight
                logits = pulled @ one.module.lm_head.weight.double()[one.labels].T
                gold = prompts.gold_index[number]
                margin = logits[:, gold] - logits[:, 1 - gold]
                residual = _last_residual(one)
                spread = (residual.square().mean() + final.variance_epsilon).sqrt()
                attention_weights = tt.qk_similarity(model, prompts[[number]], keep="labels")
                weights = attention_weights.attention.sel(layer=layer, head=head.head).values[0]
                expected = margin.detach().numpy() / float(spread) * weights
                own_part = written.margin_part.sel(source=source, chosen=str(head))
                close(own_part.isel(prompt=number), expected)


def _last_residual(one: Paths) -> torch.Tensor:
    """Return the last position's residual stream, which enters the final norm."""
    found = []
    handle = one.module.model.norm.register_forward_pre_hook(lambda m, x: found.append(x[0]))
    one.forward()
    handle.remove()
    return found[0][0, -1].double()


def test_clipped_values_have_no_parts() -> None:
    model, prompts, heads = prompts_for("mpt")
    with pytest.raises(tt.errors.CheckError, match="where a model clips them"):
        tt.score_parts(model, prompts, heads)


def test_bad_input() -> None:
    model = tiny("gpt2")
    prompts = tt.build_prompts(model, TWO, shots=1, n=2, seed=1)
    with pytest.raises(tt.errors.InputError, match="out of range"):
        tt.score_parts(model, prompts, [(9, 0)])
    with pytest.raises(tt.errors.InputError, match="keep"):
        tt.margin_parts(model, prompts, [(1, 0)], keep="nowhere")
    with pytest.raises(tt.errors.InputError, match="pairs"):
        tt.score_parts(model, prompts, [(1, 0)], pairs="yes")
