"""Choose the adapter of a model: by `config.model_type`, then by structure."""

from __future__ import annotations

from typing import Any

import torch

from ..errors import ModelError
from .architecture import Architecture
from .gpt2 import GPT2
from .gptj import GPTJ
from .gptneox import GPTNeoX
from .llama import Llama
from .phi import Phi
from .qwen3 import Qwen3

ADAPTERS: list[type[Architecture]] = [GPT2, GPTJ, GPTNeoX, Llama, Phi, Qwen3]


def register(adapter: type[Architecture]) -> type[Architecture]:
    """Register an adapter; later ones take precedence. Usable as a class decorator."""
    ADAPTERS.insert(0, adapter)
    return adapter


def find_architecture(config: Any, module: torch.nn.Module) -> Architecture:
    """Return the adapter of a model.

    Parameters
    ----------
    config
        The transformers configuration.
    module
        The model; it may be on the meta device.

    Raises
    ------
    ModelError
        If no adapter fits. An unknown model type gets the adapter whose structure fits exactly;
        the check at load then accepts or rejects it.
    """
    named = [adapter for adapter in ADAPTERS if config.model_type in adapter.model_types]
    reasons = []
    for adapter in named or ADAPTERS:
        misfit = adapter.misfit(module)
        if misfit is None:
            try:
                return adapter(config)
            except AttributeError as error:
                misfit = f"its configuration lacks {error.name}"
        reasons.append(f"{adapter.__name__}: {misfit}")
    known = sorted({t for adapter in ADAPTERS for t in adapter.model_types})
    raise ModelError(
        f"no adapter fits the architecture {config.model_type!r} ({'; '.join(reasons)}). "
        f"Known architectures: {', '.join(known)}. Add one by subclassing "
        "twotower.models.Architecture and registering it."
    )
