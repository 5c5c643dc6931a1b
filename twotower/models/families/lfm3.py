"""LFM3: LFM2 with windows, and, as configured, norms after the sublayers and gates of heads."""

from __future__ import annotations

from typing import Any

import torch

from .hybrids import Lfm2


class Lfm3(Lfm2):
    """LFM3; a gate is one factor for each head."""

    model_types = ("lfm3",)
    attention_post_norm_name = "post_operator_norm"
    mlp_post_norm_name = "post_ffn_norm"
    projection_name = "o_proj"
    more_names = frozenset({"q_norm", "k_norm", "g_proj"})

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        if not config.use_sandwich_norm:
            self.attention_post_norm_name = self.mlp_post_norm_name = None

    def qkv(self, block: Any) -> list[Any]:
        attention = self.attention(block)
        names = (*self.qkv_names, "g_proj") if self.config.use_attention_gate else self.qkv_names
        return [getattr(attention, name) for name in names]

    def has_heads(self, layer: int) -> bool:
        return bool(self.config.layer_types[layer] != "conv")

    def split(
        self, block: Any, projected: list[torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        q, k, v = (x.unflatten(-1, (-1, self.d_head)) for x in projected[:3])
        attention = self.attention(block)
        return attention.q_norm(q), attention.k_norm(k), v

    def gate(self, block: Any, projected: list[torch.Tensor]) -> torch.Tensor | None:
        return projected[3].sigmoid().unsqueeze(-1) if self.config.use_attention_gate else None
