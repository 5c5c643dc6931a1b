"""Flint: sinks, norms of queries and keys, rotary embedding in local layers."""

from __future__ import annotations

from typing import Any

import torch

from .qwen3 import Qwen3


class Flint(Qwen3):
    """Flint, a mixture of experts."""

    model_types = ("flint",)
    more_names = frozenset({"q_norm", "k_norm", "sinks"})

    def rotates(self, layer: int) -> bool:
        return self.window(layer) is not None

    def sinks(self, attention: Any) -> torch.Tensor:
        return attention.sinks
