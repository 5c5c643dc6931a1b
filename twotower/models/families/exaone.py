"""EXAONE: normed queries and keys; of mixed layers only those with a window have rotary embedding."""

from __future__ import annotations

from typing import Any

import torch

from .olmo import OLMo2
from .qwen3 import Qwen3


class ExaoneMoE(Qwen3):
    """EXAONE with a mixture of experts."""

    model_types = ("exaone_moe",)

    def rotates(self, layer: int) -> bool:
        return self.config.sliding_window is None or self.window(layer) is not None


class Exaone4(OLMo2):
    """EXAONE 4; norms follow attention and MLP."""

    model_types = ("exaone4",)

    def split(
        self, block: Any, projected: list[torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return Qwen3.split(self, block, projected)

    def rotates(self, layer: int) -> bool:
        return self.config.sliding_window is None or self.window(layer) is not None
