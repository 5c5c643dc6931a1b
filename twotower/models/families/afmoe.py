"""AFMoE (Trinity): gated heads, norms on both sides, rotary only in layers with a window."""

from __future__ import annotations

from typing import Any

import torch

from .qwen3 import Qwen3


class AFMoE(Qwen3):
    """AFMoE; a projection of its own gives a gate for each element of the heads' outputs."""

    model_types = ("afmoe",)
    attention_post_norm_name = "post_attention_layernorm"
    mlp_norm_name = "pre_mlp_layernorm"
    mlp_post_norm_name = "post_mlp_layernorm"
    qkv_names = ("q_proj", "k_proj", "v_proj", "gate_proj")

    def split(
        self, block: Any, projected: list[torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return Qwen3.split(self, block, projected[:3])

    def gate(self, block: Any, projected: list[torch.Tensor]) -> torch.Tensor:
        return projected[3].unflatten(-1, (-1, self.d_head)).sigmoid()

    def rotates(self, layer: int) -> bool:
        return self.config.layer_types[layer] == "sliding_attention"
