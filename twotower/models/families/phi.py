"""Phi: parallel attention and MLP with a shared norm, rotary embedding on part of each head."""

from __future__ import annotations

from .llama import Llama


class Phi(Llama):
    """Phi-1, Phi-1.5 and Phi-2, without norms of queries and keys."""

    model_types = ("phi",)
    final_norm_path = "model.final_layernorm"
    mlp_norm_name = "input_layernorm"
    projection_name = "dense"

    @property
    def parallel(self) -> bool:
        return True
