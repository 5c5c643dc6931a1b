"""SmolLM3: Llama's layout, with layers without rotary embedding."""

from __future__ import annotations

from .llama import Llama


class SmolLM3(Llama):
    """SmolLM3."""

    model_types = ("smollm3",)

    def rotates(self, layer: int) -> bool:
        return bool(self.config.no_rope_layers[layer])
