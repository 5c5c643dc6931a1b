"""Kolibri: norms on both sides of attention and MLP, rotary embedding in local layers."""

from __future__ import annotations

from .qwen3 import Qwen3


class Kolibri(Qwen3):
    """Kolibri 1, a mixture of experts."""

    model_types = ("kolibri1",)
    attention_post_norm_name = "post_self_attn_layernorm"
    mlp_post_norm_name = "post_mlp_layernorm"

    def rotates(self, layer: int) -> bool:
        return self.window(layer) is not None
