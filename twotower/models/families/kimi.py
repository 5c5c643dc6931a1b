"""Kimi Linear and Ling hybrids: latent attention in some layers, linear attention in the others."""

from __future__ import annotations

from typing import Any

import torch

from .mla import MLA, DirectMLA


def state_of_kimi(config: Any) -> int:
    """Return the number of elements of a Kimi delta rule's state for one sequence."""
    width = config.linear_num_heads * config.linear_head_dim
    return int(width * (config.linear_head_dim + 3 * config.linear_conv_kernel_dim))


class KimiLinear(MLA):
    """Kimi Linear, without rotary embedding."""

    model_types = ("kimi_linear",)
    mixer_name = "self_attn"
    mixer_cache = "cache_params"
    rotary = False

    def mixer_state(self) -> int:
        return state_of_kimi(self.config)


class DirectKimiLinear(DirectMLA):
    """The same with one projection to the queries."""

    model_types = ("kimi_linear",)
    mixer_name = "self_attn"
    mixer_cache = "cache_params"
    rotary = False

    def mixer_state(self) -> int:
        return state_of_kimi(self.config)


class BailingHybrid(DirectKimiLinear):
    """Ling hybrids; heads have rotary embedding and a gate each."""

    model_types = ("bailing_hybrid",)
    qkv_names = ("q_proj", "kv_a_proj_with_mqa", "g_proj")
    rotary = True
    interleaved_rotary = True
    tables = "halves"

    def gate(self, block: Any, projected: list[torch.Tensor]) -> torch.Tensor:
        return projected[2].float().sigmoid().to(projected[2].dtype).unsqueeze(-1)
