"""MPT: ALiBi, one fused projection that may be clipped; the MLP module adds the residual stream."""

from __future__ import annotations

from typing import Any

import torch

from ..architecture import Architecture, call
from .olmo import clipped


class MPT(Architecture):
    """MPT."""

    model_types = ("mpt",)
    layers_path = "transformer.blocks"
    final_norm_path = "transformer.norm_f"
    attention_norm_name = "norm_1"
    mlp_norm_name = "norm_2"
    attention_name = "attn"
    mlp_name = "ffn"
    qkv_names = ("Wqkv",)
    projection_name = "out_proj"
    rotary = False

    @property
    def max_positions(self) -> int | None:
        found: int = self.config.max_seq_len
        return found

    def feed_forward(self, block: Any, x: torch.Tensor) -> torch.Tensor:
        mlp = self.mlp(block)
        return call(mlp.down_proj, mlp.act(call(mlp.up_proj, x)))

    def mlp_output(self, block: Any) -> torch.Tensor:
        return self.mlp(block).down_proj.output

    def split(
        self, block: Any, projected: list[torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        fused = clipped(projected, self.config.attn_config.clip_qkv or None)[0]
        q, k, v = (x.unflatten(-1, (-1, self.d_head)) for x in fused.chunk(3, dim=-1))
        return q, k, v

    def key_bias(self, attention: Any, layer: int) -> torch.Tensor:
        (x, *_), named = attention.inputs
        return named["position_bias"][None, :, 0, -x.shape[1] :]

    def scaling(self, layer: int) -> float:
        scale = self.config.attn_config.softmax_scale
        return float(self.d_head**-0.5 if scale is None else scale)
