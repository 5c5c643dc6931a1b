"""Hunyuan: Llama's layout, with norms on each head's query and key after rotary."""

from __future__ import annotations

from typing import Any

import torch

from .llama import Llama


class Hunyuan(Llama):
    """Hunyuan 1, dense and with a mixture of experts."""

    model_types = ("hunyuan_v1_dense", "hunyuan_v1_moe")
    more_names = frozenset({"query_layernorm", "key_layernorm"})

    def after_rotary(self, block: Any, x: torch.Tensor, *, query: bool) -> torch.Tensor:
        attention = self.attention(block)
        return attention.query_layernorm(x) if query else attention.key_layernorm(x)
