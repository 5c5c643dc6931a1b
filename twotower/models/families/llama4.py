"""Llama 4: interleaved rotary by complex tables, chunks of positions, layers without rotary."""

from __future__ import annotations

from typing import Any

import torch

from ..architecture import first, resolve
from .llama import Llama


class Llama4(Llama):
    """Llama 4; queries and keys are normed after rotary, or scaled in layers without it."""

    model_types = ("llama4_text",)
    mlp_name = "feed_forward"
    interleaved_rotary = True
    tables = "once"

    def mlp_output(self, block: Any) -> torch.Tensor:
        mlp = self.mlp(block)
        shape = mlp.input.shape
        return first(mlp.output).view(shape)

    def rotates(self, layer: int) -> bool:
        return bool(self.config.no_rope_layers[layer])

    def rotary_tables(self, attention: Any) -> tuple[torch.Tensor, torch.Tensor]:
        turns = attention.inputs[1]["position_embeddings"]
        return turns.real, turns.imag

    def query_factor(self, attention: Any, layer: int) -> torch.Tensor | None:
        if self.rotates(layer) or not self.config.attn_temperature_tuning:
            return None
        # The model counts columns, padding included.
        turns = attention.inputs[1]["position_embeddings"]
        numbers = torch.arange(1, turns.shape[1] + 1, device=turns.device).float()
        steps = (numbers / self.config.floor_scale).floor()
        return (steps.log1p() * self.config.attn_scale + 1).unsqueeze(0)

    def after_rotary(self, block: Any, x: torch.Tensor, *, query: bool) -> torch.Tensor:
        norm = resolve(self.attention(block), "qk_norm", default=None)
        return x if norm is None else norm(x)
