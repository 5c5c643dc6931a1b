"""GLM, Helium and ERNIE: Llama's layout with interleaved rotary embedding."""

from __future__ import annotations

from typing import Any

import torch

from .llama import Llama
from .qwen3 import Qwen3


class GLM(Llama):
    """GLM, Helium and ERNIE 4.5; GLM rotates part of each head."""

    model_types = ("glm", "helium", "ernie4_5", "ernie4_5_moe")
    interleaved_rotary = True
    tables = "halves"


class GLM4(GLM):
    """GLM 4; further norms follow attention and MLP."""

    model_types = ("glm4",)
    attention_post_norm_name = "post_self_attn_layernorm"
    mlp_post_norm_name = "post_mlp_layernorm"


class GLM4MoE(Qwen3):
    """GLM 4.5 and later with experts; rotary by halves, norms of queries and keys are optional."""

    model_types = ("glm4_moe",)

    def split(
        self, block: Any, projected: list[torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        if self.config.use_qk_norm:
            return Qwen3.split(self, block, projected)
        return Llama.split(self, block, projected)
