"""GPT-NeoX Japanese: GPT-NeoX in sequence; the last block adds a bias to attention's output."""

from __future__ import annotations

from typing import Any

import torch

from ..architecture import first, resolve
from .gptneox import GPTNeoX


class GPTNeoXJapanese(GPTNeoX):
    """GPT-NeoX Japanese; the bias is taken as added after the MLP, which reads it as well."""

    model_types = ("gpt_neox_japanese",)
    layers_path = "gpt_neox_japanese.layers"
    final_norm_path = "gpt_neox_japanese.final_layer_norm"
    unembedding_path = "embed_out"
    more_names = frozenset({"dense_bias"})

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.d_mlp = config.hidden_size * config.intermediate_multiple_size

    @property
    def parallel(self) -> bool:
        return False

    def bias(self, block: Any) -> torch.Tensor | None:
        """Return the bias of a block; None without."""
        return resolve(self.attention(block), "dense_bias", default=None)

    def mlp_input(self, block: Any, x: torch.Tensor) -> torch.Tensor:
        return self.mlp_norm(block)(self.leave(block, x, None))

    def more_written(self, block: Any) -> torch.Tensor | None:
        bias = self.bias(block)
        return None if bias is None else bias.expand_as(first(block.output))

    def leave(self, block: Any, x: torch.Tensor, more: torch.Tensor | None) -> torch.Tensor:
        bias = self.bias(block)
        return x if bias is None else x + bias
