"""EXAONE: normed queries and keys; in models with windows, other layers lack rotary embedding."""

from __future__ import annotations

from .qwen3 import Qwen3


class ExaoneMoE(Qwen3):
    """EXAONE with a mixture of experts."""

    model_types = ("exaone_moe",)

    def rotates(self, layer: int) -> bool:
        return self.config.sliding_window is None or self.window(layer) is not None


class Exaone4(ExaoneMoE):
    """EXAONE 4; norms follow attention and MLP."""

    model_types = ("exaone4",)
    attention_norm_name = None
    mlp_norm_name = None
    attention_post_norm_name = "post_attention_layernorm"
    mlp_post_norm_name = "post_feedforward_layernorm"
