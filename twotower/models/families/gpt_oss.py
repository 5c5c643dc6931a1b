"""gpt-oss: Llama's layout, with a sink in every head's softmax, and experts."""

from __future__ import annotations

from typing import Any

import torch

from .llama import Llama


class GptOss(Llama):
    """gpt-oss; the score of a head's sink is a parameter of the attention module."""

    model_types = ("gpt_oss",)
    more_names = frozenset({"sinks"})
    tables = "once"

    def sinks(self, attention: Any) -> torch.Tensor:
        return attention.sinks
