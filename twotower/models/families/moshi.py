"""Moshi: each attention has a rotary embedding of its own."""

from __future__ import annotations

from typing import Any

import torch

from .llama import Llama


class Moshi(Llama):
    """Moshi's text decoder; the window in its configuration is not used."""

    model_types = ("moshi",)

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.d_mlp = config.ffn_dim

    def rotary_tables(self, attention: Any) -> tuple[torch.Tensor, torch.Tensor]:
        # The model calls this module after the projections, whose outputs are read later.
        return attention.rotary_emb(attention.input, attention.inputs[1]["position_ids"])

    def window(self, layer: int) -> int | None:
        return None
