"""BLOOM: ALiBi, one fused projection; attention and MLP modules add the residual stream."""

from __future__ import annotations

from typing import Any

import torch

from ...errors import ModelError
from ..architecture import Architecture, call


class Bloom(Architecture):
    """BLOOM."""

    model_types = ("bloom",)
    layers_path = "transformer.h"
    final_norm_path = "transformer.ln_f"
    attention_norm_name = "input_layernorm"
    mlp_norm_name = "post_attention_layernorm"
    attention_name = "self_attention"
    qkv_names = ("query_key_value",)
    projection_name = "dense"
    rotary = False

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        if config.apply_residual_connection_post_layernorm:
            raise ModelError(
                "this BLOOM model carries the norms' outputs on instead of the residual stream "
                "(apply_residual_connection_post_layernorm), which is not supported"
            )
        if config.slow_but_exact and config.pretraining_tp > 1:
            raise ModelError(
                "this BLOOM model reads slices of its projections' weights and does not call the "
                "projections (slow_but_exact); set slow_but_exact to False in its configuration"
            )

    def feed_forward(self, block: Any, x: torch.Tensor) -> torch.Tensor:
        mlp = self.mlp(block)
        return call(mlp.dense_4h_to_h, mlp.gelu_impl(call(mlp.dense_h_to_4h, x)))

    def mlp_output(self, block: Any) -> torch.Tensor:
        return self.mlp(block).dense_4h_to_h.output

    def split(
        self, block: Any, projected: list[torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return grouped(projected[0], self.n_kv_heads, self.d_head)

    def key_bias(self, attention: Any, layer: int) -> torch.Tensor:
        alibi = attention.inputs[1]["alibi"]  # (B H, 1, T)
        return alibi[:, 0].unflatten(0, (-1, self.n_heads)).float()


def grouped(
    fused: torch.Tensor, n_kv_heads: int, d_head: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Split a fused projection: each key-value head's queries, its key and its value in a row."""
    groups = fused.unflatten(-1, (n_kv_heads, -1, d_head))
    return groups[..., :-2, :].flatten(-3, -2), groups[..., -2, :], groups[..., -1, :]
