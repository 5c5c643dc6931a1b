"""HyperCLOVA X: Granite's multipliers, with norms after attention and MLP."""

from __future__ import annotations

from typing import Any

from .granite import Granite


class HyperCLOVAX(Granite):
    """HyperCLOVA X; the norms after attention and MLP are optional."""

    model_types = ("hyperclovax",)
    attention_post_norm_name = "post_norm1"
    mlp_post_norm_name = "post_norm2"

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.logit_multiplier = config.logits_scaling
        if not config.use_post_norm:
            self.attention_post_norm_name = self.mlp_post_norm_name = None
