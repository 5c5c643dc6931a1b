"""GPTBigCode (StarCoder, SantaCoder): GPT-2's layout, with one key-value head or with many."""

from __future__ import annotations

from typing import Any

import torch

from .bloom import grouped
from .gpt2 import GPT2


class GPTBigCode(GPT2):
    """GPTBigCode; the fused projection concatenates q, k and v of each key-value head."""

    model_types = ("gpt_bigcode",)

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.n_kv_heads = 1 if config.multi_query else self.n_heads

    def split(
        self, block: Any, projected: list[torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return grouped(projected[0], self.n_kv_heads, self.d_head)

    def scaling(self, layer: int) -> float:
        return float(self.d_head**-0.5) if self.config.scale_attn_weights else 1.0
