"""OLMo: norms without parameters (1), after the sublayers (2, 3), and mixtures of experts."""

from __future__ import annotations

from typing import Any

import torch

from .llama import Llama


class OLMo(Llama):
    """OLMo 1; queries, keys and values may be clipped."""

    model_types = ("olmo",)

    def split(
        self, block: Any, projected: list[torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return Llama.split(self, block, clipped(projected, self.config.clip_qkv))

    @property
    def norm_epsilon(self) -> float:
        return 1e-5


class OLMo2(Llama):
    """OLMo 2 and 3, FlexOlmo; norms follow the sublayers, and span all heads' queries or keys."""

    model_types = ("olmo2", "olmo3", "flex_olmo")
    attention_norm_name = None
    mlp_norm_name = None
    attention_post_norm_name = "post_attention_layernorm"
    mlp_post_norm_name = "post_feedforward_layernorm"
    more_names = frozenset({"q_norm", "k_norm"})

    def split(
        self, block: Any, projected: list[torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return Llama.split(self, block, normed(self.attention(block), projected))


class OLMoE(Llama):
    """OLMoE; norms span all heads' queries and keys, which may then be clipped."""

    model_types = ("olmoe",)
    more_names = frozenset({"q_norm", "k_norm"})

    def split(
        self, block: Any, projected: list[torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        of_all = normed(self.attention(block), projected)
        return Llama.split(self, block, clipped(of_all, self.config.clip_qkv))


def normed(attention: Any, projected: list[torch.Tensor]) -> list[torch.Tensor]:
    """Return queries, keys and values, with norms that span all heads' queries and keys."""
    q, k, v = projected
    return [attention.q_norm(q), attention.k_norm(k), v]


def clipped(projected: list[torch.Tensor], most: float | None) -> list[torch.Tensor]:
    """Return queries, keys and values clipped to an absolute value; None leaves them."""
    return projected if most is None else [x.clamp(min=-most, max=most) for x in projected]
