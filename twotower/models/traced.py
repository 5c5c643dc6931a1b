"""nnsight's wrapper around a loaded model, where accelerate has moved weights away."""

from __future__ import annotations

from typing import Any

import nnsight
import torch

from .model import device_of


class Traced(nnsight.TransformersModel):
    """A model that takes its inputs on the device that the embedding runs on.

    nnsight sends them to the first weight's device, which is "meta" where that weight waits
    on disk or in the processor's memory until it is needed.
    """

    @property
    def device(self) -> torch.device:
        """Where inputs are sent."""
        return device_of(self._module.get_input_embeddings())


def traced(module: Any, tokenizer: Any) -> Traced:
    """A loaded transformers model in nnsight's wrapper."""
    placed = getattr(module, "hf_device_map", None)
    if not placed:
        return Traced(module, task="text-generation", tokenizer=tokenizer)
    # transformers takes the first for the device of its pipeline, and "disk" is none.
    runs_on = device_of(module.get_input_embeddings())
    module.hf_device_map = {name: runs_on if at == "disk" else at for name, at in placed.items()}
    try:
        return Traced(module, task="text-generation", tokenizer=tokenizer)
    finally:
        module.hf_device_map = placed
