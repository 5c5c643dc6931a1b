"""DeepSeek 2: latent attention with neighbouring elements rotated, by complex tables."""

from __future__ import annotations

from typing import Any

import torch

from .mla import MLA, DirectMLA


class DeepSeek2(MLA):
    """DeepSeek 2 and 2.5."""

    model_types = ("deepseek_v2",)
    interleaved_rotary = True
    tables = "once"

    def rotary_tables(self, attention: Any) -> tuple[torch.Tensor, torch.Tensor]:
        turns = attention.inputs[1]["position_embeddings"]
        return turns.real, turns.imag


class DirectDeepSeek2(DeepSeek2):
    """DeepSeek 2 Lite, with one projection to the queries."""

    model_types = ("deepseek_v2",)
    qkv_names = DirectMLA.qkv_names
    more_names = DirectMLA.more_names

    def queries(self, block: Any, projected: torch.Tensor) -> torch.Tensor:
        return projected
