"""nanochat: Llama's layout, rotated the other way, with norms without parameters after rotary."""

from __future__ import annotations

from typing import Any

import torch

from ..architecture import first
from .llama import Llama


class NanoChat(Llama):
    """nanochat; logits are capped."""

    model_types = ("nanochat",)

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.logit_softcap = config.final_logit_softcapping

    # The first call of the final norm is at the embedding.

    def end(self, root: Any) -> torch.Tensor:
        return first(self.layers(root)[-1].output)

    def replace_end(self, root: Any, stream: torch.Tensor) -> None:
        block = self.layers(root)[-1]
        output = block.output
        block.output = (stream, *output[1:]) if isinstance(output, tuple) else stream

    def normed(self, root: Any) -> torch.Tensor:
        return self.unembedding(root).input

    def rotary_tables(self, attention: Any) -> tuple[torch.Tensor, torch.Tensor]:
        cos, sin = attention.inputs[1]["position_embeddings"]
        return cos, -sin

    def after_rotary(self, block: Any, x: torch.Tensor, *, query: bool) -> torch.Tensor:
        attention = self.attention(block)
        return attention.q_norm(x) if query else attention.k_norm(x)
