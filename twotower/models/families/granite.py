"""Granite: multipliers of scores, of what is added to the residual stream, and of logits."""

from __future__ import annotations

from typing import Any

from .llama import Llama


class Granite(Llama):
    """Granite, dense."""

    model_types = ("granite",)

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.residual_multiplier = config.residual_multiplier
        self.logit_multiplier = 1 / config.logits_scaling

    def scaling(self, layer: int) -> float:
        return float(self.config.attention_multiplier)


class GraniteMoE(Granite):
    """Granite with a mixture of experts."""

    model_types = ("granitemoe",)
    mlp_name = "block_sparse_moe"
