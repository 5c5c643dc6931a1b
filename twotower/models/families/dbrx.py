"""DBRX: norms and attention in a module of their own, one fused projection, experts."""

from __future__ import annotations

from typing import Any

import torch

from .olmo import clipped
from .phi3 import Phi3


class DBRX(Phi3):
    """DBRX; queries, keys and values are clipped."""

    model_types = ("dbrx",)
    layers_path = "transformer.blocks"
    final_norm_path = "transformer.norm_f"
    attention_norm_name = "norm_attn_norm.norm_1"
    mlp_norm_name = "norm_attn_norm.norm_2"
    attention_name = "norm_attn_norm.attn"
    mlp_name = "ffn"
    qkv_names = ("Wqkv",)
    projection_name = "out_proj"

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.d_mlp = config.ffn_config.ffn_hidden_size

    def split(
        self, block: Any, projected: list[torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return Phi3.split(self, block, clipped(projected, self.config.attn_config.clip_qkv))
