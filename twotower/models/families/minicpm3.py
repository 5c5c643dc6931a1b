"""MiniCPM 3: latent attention; multipliers of what is added to the stream, and of logits."""

from __future__ import annotations

from typing import Any

import torch

from .mla import MLA, DirectMLA


class MiniCPM3(MLA):
    """MiniCPM 3."""

    model_types = ("minicpm3",)

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.residual_multiplier = config.scale_depth / config.num_hidden_layers**0.5
        self.logit_multiplier = 1 / config.logits_scaling


class DirectMiniCPM3(MiniCPM3):
    """MiniCPM 3 with one projection to the queries."""

    model_types = ("minicpm3",)
    qkv_names = DirectMLA.qkv_names
    more_names = DirectMLA.more_names

    def queries(self, block: Any, projected: torch.Tensor) -> torch.Tensor:
        return projected
