"""Persimmon: one fused projection as in GPT-NeoX, with norms on each head's query and key."""

from __future__ import annotations

from typing import Any

import torch

from .llama import Llama


class Persimmon(Llama):
    """Persimmon and the language model of Fuyu; rotary embedding on part of each head."""

    model_types = ("persimmon",)
    final_norm_path = "model.final_layernorm"
    qkv_names = ("query_key_value",)
    projection_name = "dense"
    more_names = frozenset({"q_layernorm", "k_layernorm"})

    def split(
        self, block: Any, projected: list[torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        q, k, v = projected[0].unflatten(-1, (self.n_heads, 3, self.d_head)).unbind(-2)
        if not self.config.qk_layernorm:
            return q, k, v
        attention = self.attention(block)
        return attention.q_layernorm(q), attention.k_layernorm(k), v
