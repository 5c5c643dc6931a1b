"""Beam: sublayers scale the residual stream; gated heads, rotary embedding in local layers."""

from __future__ import annotations

from typing import Any

import torch

from .qwen3 import Qwen3


class Beam(Qwen3):
    """Beam, a mixture of experts.

    After a sublayer the stream is a sum of n parts. The model multiplies the new part by
    1 / sqrt(n), and the stream by sqrt((n - 1) / n). Here the stream is scaled once, when it leaves
    the block, so both sublayers have the first one's factor 1 / sqrt(n - 1).
    """

    model_types = ("beam",)
    attention_post_norm_name = "post_attention_layernorm"
    mlp_norm_name = "pre_feedforward_layernorm"
    mlp_post_norm_name = "post_feedforward_layernorm"
    qkv_names = ("q_proj", "k_proj", "v_proj", "gate_proj")
    more_names = frozenset({"q_norm", "k_norm", "gate_bias"})

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.logit_softcap = config.final_logit_softcapping

    def write_multiplier(self, layer: int) -> float:
        return float((2 * layer + 1) ** -0.5)

    def mlp_input(self, block: Any, x: torch.Tensor) -> torch.Tensor:
        n = block.attn_residual_add_idx
        return self.mlp_norm(block)(x * ((n - 1) / n) ** 0.5)

    def write(self, block: Any, output: torch.Tensor) -> torch.Tensor:
        return self.attention_post_norm(block)(output) * _weight(block)

    def mlp_write(self, block: Any, output: torch.Tensor) -> torch.Tensor:
        return self.mlp_post_norm(block)(output) * _weight(block)

    def written(self, block: Any, output: torch.Tensor) -> torch.Tensor:
        return self.attention_post_norm(block).output * _weight(block)

    def mlp_written(self, block: Any, output: torch.Tensor) -> torch.Tensor:
        return self.mlp_post_norm(block).output * _weight(block)

    def leave(self, block: Any, x: torch.Tensor, more: torch.Tensor | None) -> torch.Tensor:
        return x * self.stream_factor(block)

    def stream_factor(self, block: Any) -> torch.Tensor:
        n = block.attn_residual_add_idx
        return torch.tensor(((n - 1) / (n + 1)) ** 0.5, dtype=torch.float32)

    def split(
        self, block: Any, projected: list[torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return Qwen3.split(self, block, projected[:3])

    def gate(self, block: Any, projected: list[torch.Tensor]) -> torch.Tensor:
        gates = projected[3].unflatten(-1, (-1, self.d_head))
        return torch.sigmoid(gates + self.attention(block).gate_bias[:, None])

    def rotates(self, layer: int) -> bool:
        kind = self.config.layer_types[layer]
        return self.config.rope_parameters[kind] is not None

    def query_factor(self, attention: Any, layer: int) -> torch.Tensor | None:
        factor = attention.inputs[1]["attention_scaling"]
        return None if factor is None else factor[:, 0, :, 0]


def _weight(block: Any) -> float:
    """Return the factor on what a block's sublayers add to the residual stream."""
    return float((block.attn_residual_add_idx - 1) ** -0.5)
