"""Qwen3-Next and Qwen3.5: gated heads, and layers of linear attention without heads."""

from __future__ import annotations

from typing import Any

import torch

from .llama import Llama


def state_of_delta(config: Any) -> int:
    """Return the number of elements of a gated delta rule's state for one sequence."""
    keys = config.linear_num_key_heads * config.linear_key_head_dim
    values = config.linear_num_value_heads * config.linear_value_head_dim
    convolved = (2 * keys + values) * config.linear_conv_kernel_dim
    return int(values * config.linear_key_head_dim + convolved)


class Qwen35(Llama):
    """Qwen3-Next and Qwen3.5; the projection to queries holds each head's query and gate."""

    model_types = ("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text")
    more_names = frozenset({"q_norm", "k_norm"})
    mixer_name = "linear_attn"
    mixer_cache = "cache_params"

    def split(
        self, block: Any, projected: list[torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        both, k, v = Llama.split(self, block, projected)
        q = both.unflatten(-2, (-1, 2))[..., 0, :]
        attention = self.attention(block)
        return attention.q_norm(q), attention.k_norm(k), v

    def gate(self, block: Any, projected: list[torch.Tensor]) -> torch.Tensor:
        both = projected[0].unflatten(-1, (-1, 2, self.d_head))
        return both[..., 1, :].sigmoid()

    def mixer_state(self) -> int:
        return state_of_delta(self.config)
