"""MiniMax 2: Llama's layout; norms span all heads' queries and keys."""

from __future__ import annotations

from typing import Any

import torch

from .llama import Llama
from .olmo import normed


class MiniMax2(Llama):
    """MiniMax 2; rotary embedding on part of each head, and a mixture of experts."""

    model_types = ("minimax_m2",)
    more_names = frozenset({"q_norm", "k_norm"})

    def split(
        self, block: Any, projected: list[torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return Llama.split(self, block, normed(self.attention(block), projected))
