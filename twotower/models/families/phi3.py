"""Phi-3 and Phi-4: Llama's layout with one projection to queries, keys and values."""

from __future__ import annotations

from typing import Any

import torch

from .llama import Llama


class Phi3(Llama):
    """Phi-3, Phi-3.5 and Phi-4; all queries come first, then all keys, then all values."""

    model_types = ("phi3",)
    qkv_names = ("qkv_proj",)

    def split(
        self, block: Any, projected: list[torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        heads = projected[0].unflatten(-1, (-1, self.d_head))
        q, k, v = heads.split((self.n_heads, self.n_kv_heads, self.n_kv_heads), dim=-2)
        return q, k, v
