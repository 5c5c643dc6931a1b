"""Later Cohere models: Cohere 2 with experts, and the language model of Compass."""

from __future__ import annotations

from typing import Any

from .cohere import Cohere2


class Cohere2MoE(Cohere2):
    """Cohere 2 with a mixture of experts; the dense layers may rotate without a window."""

    model_types = ("cohere2_moe",)

    def rotates(self, layer: int) -> bool:
        dense = self.config.mlp_layer_types[layer] == "dense"
        forced = dense and self.config.prefix_dense_sliding_window_pattern == 1
        return forced or self.window(layer) is not None


class CohereCompass(Cohere2):
    """Compass; rotary embedding by halves, in the kinds of layers that have its parameters."""

    model_types = ("cohere_compass_text",)
    interleaved_rotary = False

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.logit_multiplier = 1.0 if config.logit_scale is None else config.logit_scale

    def rotates(self, layer: int) -> bool:
        return self.config.rope_parameters[self.config.layer_types[layer]] is not None
