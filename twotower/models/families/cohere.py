"""Cohere (Command R): parallel attention and MLP with a shared norm, interleaved rotary."""

from __future__ import annotations

from typing import Any

import torch

from .llama import Llama
from .qwen3 import Qwen3


class Cohere(Llama):
    """Command R and R+; each head's query and key may have its own norm."""

    model_types = ("cohere",)
    mlp_norm_name = "input_layernorm"
    more_names = frozenset({"q_norm", "k_norm"})
    interleaved_rotary = True

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.logit_multiplier = config.logit_scale

    @property
    def parallel(self) -> bool:
        return True

    def split(
        self, block: Any, projected: list[torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        if self.config.use_qk_norm:
            return Qwen3.split(self, block, projected)
        return Llama.split(self, block, projected)


class Cohere2(Cohere):
    """Command R7B and A; only layers with a window have rotary embedding."""

    model_types = ("cohere2",)

    def split(
        self, block: Any, projected: list[torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return Llama.split(self, block, projected)

    def rotates(self, layer: int) -> bool:
        return self.config.layer_types[layer] == "sliding_attention"
