"""Write a mechanism into models of a family: GPT-2, GPT-J, Llama, GPT-NeoX, Gemma 2, OLMo 2."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    GPTJConfig,
    GPTNeoXConfig,
    LlamaConfig,
    Olmo2Config,
    PretrainedConfig,
)

from .mechanism import Slots
from .norms import NormsAfter

NARROW = 32
"""Head width for which the frequencies are chosen."""

N_NEAR = 5
LEARNED = (1.0, 0.42, 0.178, 0.075, 0.032)
"""Frequencies of learned positions; the slowest distinguishes texts over 190 tokens."""


@dataclass(frozen=True)
class HeadWeights:
    """Weights of one head: q, k and v (d_head, d_model), o (d_model, d_head)."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    o: torch.Tensor


@dataclass(frozen=True)
class Family:
    """Layout of a model family.

    Attributes
    ----------
    config
        Function of d_model, layers, heads, key-value heads and options common to all families.
    slots
        Function of d_head; returns the elements for the parts of queries and keys.
    write
        Function that writes a layer's heads into its attention module.
    base
        Attribute of the model that holds everything except the unembedding.
    layers, attention
        Names of the list of layers, and of a layer's attention.
    embedding, learned_positions
        Names in the base.
    grouped
        Whether two query heads share a key-value head.
    scaled_embedding
        Whether the model multiplies embeddings by the square root of d_model.
    norms_after
        Norms after attention and MLP; None without.
    """

    config: Callable[..., PretrainedConfig]
    slots: Callable[[int], Slots]
    write: Callable[[Any, Sequence[HeadWeights], int], None]
    base: str
    layers: str
    attention: str
    embedding: str
    learned_positions: str | None = None
    grouped: bool = False
    scaled_embedding: bool = False
    norms_after: NormsAfter | None = None


def rotary(width: int, base: float, interleaved: bool) -> list[tuple[int, int, float]]:
    """Return pairs of elements that rotary turns together, with frequencies, fastest first."""
    half = width // 2
    return [
        ((2 * i, 2 * i + 1) if interleaved else (i, i + half)) + (base ** (-i / half),)
        for i in range(half)
    ]


def llama_slots(d_head: int) -> Slots:
    """Return slots where all elements turn: content takes the slowest pairs."""
    pairs = rotary(d_head, LLAMA_BASE, interleaved=False)
    step = d_head // NARROW  # wider heads have more frequencies in between
    near = pairs[: N_NEAR * step : step]
    content = [a for a, _, _ in pairs[7 * step :]]
    return Slots(content, near, pairs[5 * step], spare=pairs[6 * step][0])


def partial_slots(interleaved: bool) -> Callable[[int], Slots]:
    """Return a slots function for families in which half of the elements turn."""

    def slots(d_head: int) -> Slots:
        pairs = rotary(d_head // 2, 10_000.0, interleaved)
        step = d_head // NARROW
        content = list(range(d_head // 2, d_head))
        return Slots(content, pairs[: 4 * step : step], pairs[4 * step])

    return slots


def learned_slots(d_head: int) -> Slots:
    """Return slots where no element turns: positions come from the residual stream."""
    near = [(2 * f, 2 * f + 1, theta) for f, theta in enumerate(LEARNED)]
    first = 2 * len(near)
    return Slots(list(range(first + 2, d_head)), near, text=(first, first + 1))


LLAMA_BASE = 1e6

WINDOW = 64
"""Tokens that a local layer of Gemma 2 sees: gathering needs 3, matching as many as have labels."""


def _sizes(d: int, layers: int, heads: int) -> dict[str, int]:
    return {
        "hidden_size": d,
        "intermediate_size": d,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
    }


def _llama(d: int, layers: int, heads: int, kv: int, **common: Any) -> Any:
    return LlamaConfig(
        **_sizes(d, layers, heads),
        num_key_value_heads=kv,
        head_dim=d // heads,
        rope_parameters={"rope_type": "default", "rope_theta": LLAMA_BASE},
        tie_word_embeddings=False,
        **common,
    )


def _gemma2(d: int, layers: int, heads: int, kv: int, **common: Any) -> Any:
    return Gemma2Config(
        **_sizes(d, layers, heads),
        num_key_value_heads=kv,
        head_dim=d // heads,
        query_pre_attn_scalar=d // heads,
        sliding_window=WINDOW,
        rope_parameters={"rope_type": "default", "rope_theta": LLAMA_BASE},
        tie_word_embeddings=False,
        attention_bias=True,  # for the ballast
        **common,
    )


def _olmo2(d: int, layers: int, heads: int, kv: int, **common: Any) -> Any:
    return Olmo2Config(
        **_sizes(d, layers, heads),
        rope_parameters={"rope_type": "default", "rope_theta": LLAMA_BASE},
        tie_word_embeddings=False,
        attention_bias=True,  # for the ballast
        **common,
    )


def _neox(d: int, layers: int, heads: int, kv: int, **common: Any) -> Any:
    return GPTNeoXConfig(
        **_sizes(d, layers, heads),
        rope_parameters={
            "rope_type": "default",
            "rope_theta": 10_000.0,
            "partial_rotary_factor": 0.5,
        },
        **common,
    )


def _gptj(d: int, layers: int, heads: int, kv: int, **common: Any) -> Any:
    return GPTJConfig(
        n_embd=d,
        n_inner=d,
        n_layer=layers,
        n_head=heads,
        n_positions=common.pop("max_position_embeddings"),
        rotary_dim=d // heads // 2,
        **NO_DROPOUT,
        **common,
    )


def _gpt2(d: int, layers: int, heads: int, kv: int, **common: Any) -> Any:
    return GPT2Config(
        n_embd=d,
        n_inner=d,
        n_layer=layers,
        n_head=heads,
        n_positions=common.pop("max_position_embeddings"),
        tie_word_embeddings=False,
        **NO_DROPOUT,
        **common,
    )


NO_DROPOUT: dict[str, Any] = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}


def _write_apart(output: str) -> Callable[[Any, Sequence[HeadWeights], int], None]:
    """Return a writer for separate projections, also with fewer key-value heads."""

    def write(attention: Any, heads: Sequence[HeadWeights], kv: int) -> None:
        shared = heads[:: len(heads) // kv]
        attention.q_proj.weight.copy_(torch.cat([head.q for head in heads]))
        attention.k_proj.weight.copy_(torch.cat([head.k for head in shared]))
        attention.v_proj.weight.copy_(torch.cat([head.v for head in shared]))
        getattr(attention, output).weight.copy_(torch.cat([head.o for head in heads], dim=1))

    return write


def _write_gpt2(attention: Any, heads: Sequence[HeadWeights], kv: int) -> None:
    """Write the heads into one transposed projection for q, k and v."""
    parts = [torch.cat([getattr(head, name) for head in heads]) for name in "qkv"]
    attention.c_attn.weight.copy_(torch.cat(parts).T)
    attention.c_proj.weight.copy_(torch.cat([head.o for head in heads], dim=1).T)


def _write_neox(attention: Any, heads: Sequence[HeadWeights], kv: int) -> None:
    """Write the heads into one projection, head by head."""
    parts = [torch.cat([head.q, head.k, head.v]) for head in heads]
    attention.query_key_value.weight.copy_(torch.cat(parts))
    attention.dense.weight.copy_(torch.cat([head.o for head in heads], dim=1))


_NAMES = ("model", "layers", "self_attn", "embed_tokens")

FAMILIES = {
    "llama": Family(_llama, llama_slots, _write_apart("o_proj"), *_NAMES, grouped=True),
    "gptj": Family(
        _gptj, partial_slots(True), _write_apart("out_proj"), "transformer", "h", "attn", "wte"
    ),
    "neox": Family(
        _neox, partial_slots(False), _write_neox, "gpt_neox", "layers", "attention", "embed_in"
    ),
    "gpt2": Family(_gpt2, learned_slots, _write_gpt2, "transformer", "h", "attn", "wte", "wpe"),
    "gemma2": Family(
        _gemma2,
        llama_slots,
        _write_apart("o_proj"),
        *_NAMES,
        grouped=True,
        scaled_embedding=True,
        norms_after=NormsAfter(one=0.0, heads=False),
    ),
    "olmo2": Family(
        _olmo2,
        llama_slots,
        _write_apart("o_proj"),
        *_NAMES,
        norms_after=NormsAfter(one=1.0, heads=True),
    ),
}


def empty_model(config: PretrainedConfig, one: float) -> Any:
    """Make a model with zero matrices, and norms that multiply by 1: the weight `one` does."""
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            norm = parameter.dim() == 1 and name.endswith("weight")
            parameter.fill_(one if norm else 0.0)
    return model.eval().requires_grad_(False)
