"""StableLM: LayerNorm, rotary embedding on part of each head, blocks in sequence or parallel."""

from __future__ import annotations

from typing import Any

import torch

from .llama import Llama


class StableLM(Llama):
    """StableLM; each head's query and key may have its own norm."""

    model_types = ("stablelm",)
    more_names = frozenset({"q_layernorm", "k_layernorm"})

    def split(
        self, block: Any, projected: list[torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        q, k, v = Llama.split(self, block, projected)
        if not self.config.qk_layernorm:
            return q, k, v
        attention = self.attention(block)
        return per_head(attention.q_layernorm, q), per_head(attention.k_layernorm, k), v


class ParallelStableLM(StableLM):
    """StableLM with parallel attention and MLP and a shared norm."""

    model_types = ("stablelm",)
    mlp_norm_name = "input_layernorm"

    @property
    def parallel(self) -> bool:
        return True


def per_head(norm: Any, x: torch.Tensor) -> torch.Tensor:
    """Apply to heads (..., heads, d_head) a module that norms dim 1 of its input by head."""
    return norm(x.flatten(0, -3)).unflatten(0, x.shape[:-2])
