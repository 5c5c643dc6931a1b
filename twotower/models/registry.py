"""Choose the adapter of a model: by `config.model_type`, then by structure."""

from __future__ import annotations

from typing import Any

import torch

from ..errors import ModelError
from .architecture import Architecture
from .families import ADAPTERS
from .fit import located, misfit


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
    config = config.get_text_config(decoder=True)
    named = [adapter for adapter in ADAPTERS if config.model_type in adapter.model_types]
    reasons = []
    for adapter in named or ADAPTERS:
        reason = misfit(adapter, module)
        if reason is None:
            try:
                architecture = adapter(config)
            except AttributeError as error:
                reason = f"its configuration lacks {error.name}"
            else:
                for name, path in located(adapter, module).items():
                    setattr(architecture, name, path)
                return architecture
        reasons.append(f"{adapter.__name__}: {reason}")
    known = sorted({t for adapter in ADAPTERS for t in adapter.model_types})
    raise ModelError(
        f"no adapter fits the architecture {config.model_type!r} ({'; '.join(reasons)}). "
        f"Known architectures: {', '.join(known)}. Add one by subclassing "
        "twotower.models.Architecture and registering it."
    )
