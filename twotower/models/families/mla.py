"""Latent attention (MLA): keys and values come from a latent vector, most often queries too."""

from __future__ import annotations

import math
from typing import Any

import torch

from ..architecture import call
from .llama import Llama


class MLA(Llama):
    """DeepSeek 3 and models like it; the last elements of a head are rotated.

    The rotated part of the key is shared by all heads. Here every head has a key of its own.
    """

    model_types = ("deepseek_v3", "youtu", "glm4_moe_lite", "axk1")
    qkv_names = ("q_a_proj", "kv_a_proj_with_mqa")
    more_names = frozenset({"q_a_layernorm", "q_b_proj", "kv_a_layernorm", "kv_b_proj"})

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.d_head = config.v_head_dim
        self.d_key = config.qk_nope_head_dim + config.qk_rope_head_dim
        self.n_kv_heads = self.n_heads
        if getattr(config, "rope_interleave", False):
            self.interleaved_rotary, self.tables = True, "halves"

    def split(
        self, block: Any, projected: list[torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        attention, config = self.attention(block), self.config
        q, latent = self.queries(block, projected[0]), projected[1]
        sizes = (config.kv_lora_rank, config.qk_rope_head_dim)
        latent, shared = latent.split(sizes, dim=-1)
        expanded = call(attention.kv_b_proj, attention.kv_a_layernorm(latent))
        heads = expanded.unflatten(-1, (self.n_heads, -1))
        k, v = heads.split((config.qk_nope_head_dim, config.v_head_dim), dim=-1)
        shared = shared.unsqueeze(-2).expand(*k.shape[:-1], -1)
        return q.unflatten(-1, (self.n_heads, -1)), torch.cat((k, shared), dim=-1), v

    def queries(self, block: Any, projected: torch.Tensor) -> torch.Tensor:
        """Return all heads' queries (..., features), from the output of the first projection."""
        attention = self.attention(block)
        return call(attention.q_b_proj, attention.q_a_layernorm(projected))

    def rotate(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        rest = x.shape[-1] - cos.shape[-1]
        rotated = Llama.rotate(self, x[..., rest:], cos, sin)
        return torch.cat((x[..., :rest], rotated), dim=-1)

    def scaling(self, layer: int) -> float:
        scale = float((self.config.qk_nope_head_dim + self.config.qk_rope_head_dim) ** -0.5)
        rope = getattr(self.config, "rope_parameters", None) or {}
        stretch, strength = rope.get("factor") or 1, rope.get("mscale_all_dim") or 0
        if rope.get("rope_type", "default") == "default" or not strength or stretch <= 1:
            return scale
        return scale * (0.1 * strength * math.log(stretch) + 1) ** 2


class DirectMLA(MLA):
    """The same with one projection to the queries."""

    model_types = ("deepseek_v3", "youtu", "glm4_moe_lite")
    qkv_names = ("q_proj", "kv_a_proj_with_mqa")
    more_names = frozenset({"kv_a_layernorm", "kv_b_proj"})

    def queries(self, block: Any, projected: torch.Tensor) -> torch.Tensor:
        return projected
