"""Falcon: one fused projection, rotary embedding or ALiBi, blocks parallel or in sequence."""

from __future__ import annotations

import math
from typing import Any

import torch

from ...errors import ModelError
from ..architecture import Architecture
from .bloom import grouped


class Falcon(Architecture):
    """Falcon 7B and others; parallel attention and MLP with a shared norm."""

    model_types = ("falcon",)
    layers_path = "transformer.h"
    final_norm_path = "transformer.ln_f"
    attention_norm_name = "input_layernorm"
    mlp_norm_name = "input_layernorm"
    attention_name = "self_attention"
    qkv_names = ("query_key_value",)
    projection_name = "dense"

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.d_mlp = config.ffn_hidden_size
        self.rotary = not config.alibi
        if config.alibi and config._attn_implementation == "eager":
            raise ModelError(
                "transformers' eager attention adds Falcon's ALiBi twice, unlike the trained "
                "model; load with attn_implementation='sdpa'"
            )
        if config.new_decoder_architecture:
            self.n_kv_heads = config.num_kv_heads
        else:
            self.n_kv_heads = 1 if config.multi_query else self.n_heads

    @property
    def parallel(self) -> bool:
        return True

    def mlp_output(self, block: Any) -> torch.Tensor:
        # Parallel blocks add attention's output in place.
        return self.mlp(block).output.clone()

    def split(
        self, block: Any, projected: list[torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return grouped(projected[0], self.n_kv_heads, self.d_head)

    def key_bias(self, attention: Any, layer: int) -> torch.Tensor | None:
        if self.rotary:
            return None
        alibi = attention.inputs[1]["alibi"][:, :, 0]
        return (alibi / math.sqrt(self.d_head)).float()


class TwoNormFalcon(Falcon):
    """Falcon 40B and 180B; attention and MLP have a norm each."""

    model_types = ("falcon",)
    attention_norm_name = "ln_attn"
    mlp_norm_name = "ln_mlp"


class SequentialFalcon(Falcon):
    """Falcon-RW; the MLP follows attention."""

    model_types = ("falcon",)
    mlp_norm_name = "post_attention_layernorm"

    @property
    def parallel(self) -> bool:
        return False
