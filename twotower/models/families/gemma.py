"""Gemma 2 and 3: norms on both sides of attention and MLP, capped scores, local layers."""

from __future__ import annotations

from typing import Any

import torch

from .llama import Llama
from .qwen3 import Qwen3


class Gemma2(Llama):
    """Gemma 2; scores and logits are capped if the configuration says so."""

    model_types = ("gemma2",)
    attention_post_norm_name = "post_attention_layernorm"
    mlp_norm_name = "pre_feedforward_layernorm"
    mlp_post_norm_name = "post_feedforward_layernorm"

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.score_softcap = config.attn_logit_softcapping
        self.logit_softcap = config.final_logit_softcapping

    def scaling(self, layer: int) -> float:
        return float(self.config.query_pre_attn_scalar**-0.5)


class Gemma3(Gemma2):
    """Gemma 3, also inside its vision-language model; heads' queries and keys are normed."""

    model_types = ("gemma3_text",)
    more_names = frozenset({"q_norm", "k_norm"})

    def split(
        self, block: Any, projected: list[torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return Qwen3.split(self, block, projected)


class VaultGemma(Gemma2):
    """VaultGemma: Gemma 2 without norms after attention and MLP."""

    model_types = ("vaultgemma",)
    attention_post_norm_name = None
    mlp_post_norm_name = None
