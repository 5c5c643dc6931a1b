"""Phi-4 multimodal: Phi-3's layout."""

from __future__ import annotations

from .phi3 import Phi3


class Phi4Multimodal(Phi3):
    """Phi-4 multimodal; its language model is checked with text only."""

    model_types = ("phi4_multimodal",)
