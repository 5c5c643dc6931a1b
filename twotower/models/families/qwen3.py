"""Qwen3: Llama's layout, with norms on each head's query and key before rotary."""

from __future__ import annotations

from typing import Any

import torch

from .llama import Llama


class Qwen3(Llama):
    """Qwen3 and others; q_norm and k_norm act on each head's d_head elements."""

    model_types = ("dots1", "hy_v3", "mellum", "qwen3", "qwen3_moe")

    more_names = frozenset({"q_norm", "k_norm"})

    def split(
        self, block: Any, projected: list[torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        # super() does not work in a method sent to a server as source.
        q, k, v = Llama.split(self, block, projected)
        attention = self.attention(block)
        return attention.q_norm(q), attention.k_norm(k), v
