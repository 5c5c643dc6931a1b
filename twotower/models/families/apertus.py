"""Apertus: Qwen3's layout with other names of norms."""

from __future__ import annotations

from .qwen3 import Qwen3


class Apertus(Qwen3):
    """Apertus."""

    model_types = ("apertus",)
    attention_norm_name = "attention_layernorm"
    mlp_norm_name = "feedforward_layernorm"
