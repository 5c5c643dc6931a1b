"""GPT-Neo: GPT-2's layout with three projections, unscaled scores and local layers."""

from __future__ import annotations

from typing import Any

import torch

from .gpt2 import GPT2
from .llama import Llama


class GPTNeo(GPT2):
    """GPT-Neo; every second layer has a window."""

    model_types = ("gpt_neo",)
    attention_name = "attn.attention"
    qkv_names = ("q_proj", "k_proj", "v_proj")
    projection_name = "out_proj"

    def split(
        self, block: Any, projected: list[torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return Llama.split(self, block, projected)

    def scaling(self, layer: int) -> float:
        return 1.0

    def window(self, layer: int) -> int | None:
        local = self.config.attention_layers[layer] == "local"
        return int(self.config.window_size) if local else None
