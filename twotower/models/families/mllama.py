"""Llama 3.2 Vision: text passes by the layers of cross-attention, which are not counted."""

from __future__ import annotations

from typing import Any

from ..architecture import resolve
from .llama import Llama


class Mllama(Llama):
    """Llama 3.2 Vision without images; layers are numbered as in Llama 3.1."""

    model_types = ("mllama_text_model",)
    mixer_name = "cross_attn"
    more_names = frozenset({"cross_attn_attn_gate", "cross_attn_mlp_gate"})

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        passed = (layer for layer in config.cross_attention_layers if layer < self.n_layers)
        self.passed = frozenset(passed)
        self.n_layers -= len(self.passed)

    def has_heads(self, layer: int) -> bool:
        return True  # layers of cross-attention, which have none, are not counted

    def layers(self, root: Any) -> list[Any]:
        blocks = enumerate(resolve(root, self.layers_path))
        return [block for index, block in blocks if index not in self.passed]
