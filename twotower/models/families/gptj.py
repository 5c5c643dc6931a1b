"""GPT-J: parallel attention and MLP with a shared norm, interleaved rotary embedding."""

from __future__ import annotations

from typing import Any

import torch

from ..architecture import Architecture


class GPTJ(Architecture):
    """GPT-J; only the first `rotary_dim` elements of a head are rotated."""

    model_types = ("gptj",)
    layers_path = "transformer.h"
    final_norm_path = "transformer.ln_f"
    unembedding_path = "lm_head"
    attention_norm_name = "ln_1"
    mlp_norm_name = "ln_1"
    attention_name = "attn"
    qkv_names = ("q_proj", "k_proj", "v_proj")
    projection_name = "out_proj"
    interleaved_rotary = True

    @property
    def parallel(self) -> bool:
        return True

    def split(
        self, block: Any, projected: list[torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        q, k, v = (x.unflatten(-1, (-1, self.d_head)) for x in projected)
        return q, k, v

    def rotary_tables(self, attention: Any) -> tuple[torch.Tensor, torch.Tensor]:
        # The module keeps a table of all positions in a buffer, which an offloaded or remote
        # module may lack. The same numbers are computed here from the definition.
        positions = attention.inputs[1]["position_ids"]
        rotated = self.config.rotary_dim or self.d_model
        exponents = torch.arange(0, rotated, 2, device=positions.device).float() / rotated
        angles = positions.unsqueeze(-1).float() * 10000.0**-exponents
        angles = angles.repeat_interleave(2, dim=-1)
        return angles.cos(), angles.sin()
