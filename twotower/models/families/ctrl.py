"""CTRL: Llama's layout with other names and fixed position embeddings."""

from __future__ import annotations

from typing import Any

import torch

from .llama import Llama


class CTRL(Llama):
    """CTRL; the model adds its position embedding outside of any module."""

    model_types = ("ctrl",)
    layers_path = "transformer.h"
    final_norm_path = "transformer.layernorm"
    attention_norm_name = "layernorm1"
    mlp_norm_name = "layernorm2"
    attention_name = "multi_head_attention"
    mlp_name = "ffn"
    qkv_names = ("Wq", "Wk", "Wv")
    projection_name = "dense"
    rotary = False

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.d_mlp = config.dff

    def learned_positions(self, root: Any) -> torch.Tensor:
        # The model keeps a table in a buffer, which an offloaded or remote model may lack.
        positions = root.transformer.inputs[1]["position_ids"].unsqueeze(-1)
        exponents = torch.arange(0, self.d_model, 2, device=positions.device) / self.d_model
        angles = positions * 10000.0**-exponents
        return torch.cat((angles.sin(), angles.cos()), dim=-1)
