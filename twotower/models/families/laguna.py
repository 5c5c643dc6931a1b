"""Laguna: heads' outputs are gated; the number of heads depends on the layer."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional

from .qwen3 import Qwen3


class Laguna(Qwen3):
    """Laguna, a mixture of experts; gates of heads or of their elements."""

    model_types = ("laguna",)
    qkv_names = ("q_proj", "k_proj", "v_proj", "g_proj")

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.n_heads = max(config.num_attention_heads_per_layer)

    def heads_in(self, layer: int) -> int:
        return self.config.num_attention_heads_per_layer[layer]

    def split(
        self, block: Any, projected: list[torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return Qwen3.split(self, block, projected[:3])

    def gate(self, block: Any, projected: list[torch.Tensor]) -> torch.Tensor:
        gates = functional.softplus(projected[3].float()).to(projected[3].dtype)
        by_head = self.config.gating in (True, "per-head")
        return gates.unflatten(-1, (-1, 1 if by_head else self.d_head))
