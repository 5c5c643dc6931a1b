"""Gemma 4: head sizes by layer, shared keys and values, per-layer embeddings, scaled blocks."""

from __future__ import annotations

from typing import Any

import torch

from ..architecture import call
from .gemma import Gemma2


class Gemma4(Gemma2):
    """Gemma 4, also inside its multimodal models; queries, keys and values are normed."""

    model_types = ("gemma4_text", "gemma4_unified_text")
    more_names = frozenset(
        {
            "q_norm",
            "k_norm",
            "k_proj",
            "v_proj",
            "per_layer_input_gate",
            "per_layer_projection",
            "post_per_layer_input_norm",
            "router",
            "experts",
            "post_feedforward_layernorm_1",
            "post_feedforward_layernorm_2",
            "pre_feedforward_layernorm_2",
        }
    )
    qkv_names = ("q_proj",)

    def __init__(self, config: Any) -> None:
        layers = range(config.num_hidden_layers)
        self.by_layer = [config.per_layer_config[layer] for layer in layers]
        self.config = config
        self.n_layers = config.num_hidden_layers
        self.n_heads = config.num_attention_heads
        self.n_kv_heads = max(layer.num_key_value_heads for layer in self.by_layer)
        self.d_model = config.hidden_size
        self.d_head = max(layer.head_dim for layer in self.by_layer)
        self.d_key = self.d_head
        self.d_mlp = config.intermediate_size
        self.vocabulary_size = config.vocab_size
        self.logit_softcap = config.final_logit_softcapping

    def scaling(self, layer: int) -> float:
        return 1.0

    def keys_of(self, layer: int) -> int:
        modes, kinds = self.config.kv_sharing_modes, self.config.layer_types
        if modes[layer] != "reuse":
            return layer
        stored = zip(range(self.n_layers), modes, kinds, strict=True)
        return next(x for x, mode, kind in stored if mode == "store" and kind == kinds[layer])

    def qkv(self, block: Any) -> list[Any]:
        attention = self.attention(block)
        names = ("q_proj", "k_proj", "v_proj")
        return [getattr(attention, name) for name in names if _has(attention, name)]

    def split(
        self, block: Any, projected: list[torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        attention = self.attention(block)
        q, *rest = (x.unflatten(-1, (-1, attention.head_dim)) for x in projected)
        q = attention.q_norm(q)
        if not rest:
            return q, None, None  # type: ignore[return-value]
        # Without a projection to values, the keys before their norm are the values.
        return q, attention.k_norm(rest[0]), attention.v_norm(rest[-1])

    def mlp_input(self, block: Any, x: torch.Tensor) -> torch.Tensor:
        return x if _has_experts(block) else block.pre_feedforward_layernorm(x)

    def feed_forward(self, block: Any, x: torch.Tensor) -> torch.Tensor:
        if not _has_experts(block):
            return call(block.mlp, x)
        dense = block.post_feedforward_layernorm_1(block.mlp(block.pre_feedforward_layernorm(x)))
        flat = x.flatten(0, -2)
        _, weights, chosen = block.router(flat)
        sparse = block.experts(block.pre_feedforward_layernorm_2(flat), chosen, weights)
        return dense + block.post_feedforward_layernorm_2(sparse.view(x.shape))

    def mlp_output(self, block: Any) -> torch.Tensor:
        return block.post_feedforward_layernorm.input

    def writes_more(self, layer: int) -> bool:
        return bool(getattr(self.config, "hidden_size_per_layer_input", None))

    def more_input(self, block: Any) -> torch.Tensor | None:
        if not self.writes_more(0):
            return None
        return block.inputs[0][1]

    def more_written(self, block: Any) -> torch.Tensor | None:
        if not self.writes_more(0):
            return None
        return block.post_per_layer_input_norm.output

    def leave(self, block: Any, x: torch.Tensor, more: torch.Tensor | None) -> torch.Tensor:
        if more is not None:
            gate = block.act_fn(block.per_layer_input_gate(x)) * more
            x = x + block.post_per_layer_input_norm(block.per_layer_projection(gate))
        return x * block.layer_scalar

    def stream_factor(self, block: Any) -> torch.Tensor:
        return block.layer_scalar[0]


def _has_experts(block: Any) -> bool:
    return bool(getattr(block, "enable_moe_block", False))


def _has(module: Any, name: str) -> bool:
    return getattr(module, name, None) is not None
