"""Llama and models that compute alike: three projections, rotary embedding by halves."""

from __future__ import annotations

from typing import Any

import torch

from ..architecture import Architecture


class Llama(Architecture):
    """Llama, Mistral, Qwen2 and others; there may be fewer key-value heads than query heads."""

    model_types = (
        "arcee",
        "aria_text",
        "cwm",
        "gemma",
        "internlm3",
        "iquestcoder",
        "jais2",
        "llama",
        "ministral",
        "mistral",
        "mixtral",
        "nemotron",
        "phimoe",
        "qwen2",
        "qwen2_moe",
        "seed_oss",
        "solar_open",
        "starcoder2",
    )
    layers_path = "model.layers"
    final_norm_path = "model.norm"
    unembedding_path = "lm_head"
    attention_norm_name = "input_layernorm"
    mlp_norm_name = "post_attention_layernorm"
    attention_name = "self_attn"
    qkv_names = ("q_proj", "k_proj", "v_proj")
    projection_name = "o_proj"

    def split(
        self, block: Any, projected: list[torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        q, k, v = (x.unflatten(-1, (-1, self.d_head)) for x in projected)
        return q, k, v
