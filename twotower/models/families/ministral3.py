"""Ministral 3: Llama's layout, with queries scaled by their position."""

from __future__ import annotations

from typing import Any

import torch

from .llama import Llama


class Ministral3(Llama):
    """Ministral 3."""

    model_types = ("ministral3",)

    def query_factor(self, attention: Any, layer: int) -> torch.Tensor:
        rope = self.config.rope_parameters
        positions = attention.inputs[1]["position_ids"]
        steps = (positions / rope["original_max_position_embeddings"]).floor()
        factor = 1 + rope["llama_4_scaling_beta"] * (1 + steps).log()
        return factor.to(self.rotary_tables(attention)[0].dtype)
