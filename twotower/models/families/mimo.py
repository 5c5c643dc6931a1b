"""MiMo: values smaller than keys; local layers have sinks and twice as many key-value heads."""

from __future__ import annotations

from typing import Any

import torch

from .llama import Llama


class MiMo2(Llama):
    """MiMo-V2-Flash, a mixture of experts; values are multiplied by a constant."""

    model_types = ("mimo_v2_flash",)
    more_names = frozenset({"sinks"})

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.d_head = config.v_head_dim
        if "sliding_attention" in config.layer_types:
            self.n_kv_heads *= 2

    def split(
        self, block: Any, projected: list[torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        q, k = (x.unflatten(-1, (-1, self.config.head_dim)) for x in projected[:2])
        v = projected[2].unflatten(-1, (-1, self.d_head))
        scale = self.config.attention_value_scale
        return q, k, v if scale is None else v * scale

    def sinks(self, attention: Any) -> torch.Tensor | None:
        return attention.sinks

    def scaling(self, layer: int) -> float:
        return float(self.config.head_dim**-0.5)
