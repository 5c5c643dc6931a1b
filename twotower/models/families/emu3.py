"""Emu3: the language model has Llama's layout."""

from __future__ import annotations

from .llama import Llama


class Emu3(Llama):
    """Emu3; images are tokens."""

    model_types = ("emu3_text_model",)
