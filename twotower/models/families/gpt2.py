"""GPT-2: one fused projection, learned position embeddings, LayerNorm."""

from __future__ import annotations

from typing import Any

import torch

from ..architecture import Architecture


class GPT2(Architecture):
    """GPT-2."""

    model_types = ("gpt2",)
    layers_path = "transformer.h"
    final_norm_path = "transformer.ln_f"
    unembedding_path = "lm_head"
    attention_norm_name = "ln_1"
    mlp_norm_name = "ln_2"
    attention_name = "attn"
    qkv_names = ("c_attn",)
    projection_name = "c_proj"
    learned_positions_path = "transformer.wpe"
    rotary = False

    def split(
        self, block: Any, projected: list[torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        q, k, v = (x.unflatten(-1, (-1, self.d_head)) for x in projected[0].chunk(3, dim=-1))
        return q, k, v

    def scaling(self, layer: int) -> float:
        scale = self.d_head**-0.5 if self.config.scale_attn_weights else 1.0
        return scale / (layer + 1) if self.config.scale_attn_by_inverse_layer_idx else scale
