"""GPT-NeoX and Pythia: one fused projection that concatenates q, k, v of each head."""

from __future__ import annotations

from typing import Any

import torch

from ..architecture import Architecture


class GPTNeoX(Architecture):
    """GPT-NeoX and Pythia; rotary embedding on the first elements of each head."""

    model_types = ("gpt_neox",)
    layers_path = "gpt_neox.layers"
    final_norm_path = "gpt_neox.final_layer_norm"
    unembedding_path = "lm_head"
    attention_norm_name = "input_layernorm"
    mlp_norm_name = "post_attention_layernorm"
    attention_name = "attention"
    qkv_names = ("query_key_value",)
    projection_name = "dense"

    @property
    def parallel(self) -> bool:
        return bool(self.config.use_parallel_residual)

    def split(
        self, block: Any, projected: list[torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        q, k, v = projected[0].unflatten(-1, (self.n_heads, 3 * self.d_head)).chunk(3, dim=-1)
        return q, k, v
