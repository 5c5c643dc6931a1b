"""Choose the adapter of a model: by `config.model_type`, then by structure."""

from __future__ import annotations

from typing import Any

import torch

from ..errors import ModelError
from .architecture import Architecture
from .families import ADAPTERS
from .fit import located, misfit
from .refused import RECURRENT, REFUSED


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
        If no adapter names the model type, or the named ones do not fit. Says why, or which
        adapter has the same structure.
    """
    config = language_config(config)
    kind = config.model_type
    reasons = []
    for adapter in ADAPTERS:
        if kind in adapter.model_types:
            reason = misfit(adapter, module)
            if reason is None:
                return _located(adapter, config, module)
            reasons.append(f"{adapter.__name__}: {reason}")
    if reasons:
        raise ModelError(f"the adapter of {kind!r} does not fit this model ({'; '.join(reasons)})")
    check_not_refused(config)
    alike = [adapter for adapter in ADAPTERS if misfit(adapter, module) is None]
    also = ""
    if alike:
        widest = max(alike, key=lambda adapter: len(adapter.model_types))
        also = f" Its parts have the same names as in the adapter {widest.__name__}."
    raise _unknown(kind, also)


def check_known(config: Any) -> None:
    """Check that an adapter names a configuration's model type, before weights are read.

    Raises
    ------
    ModelError
        If none does, though transformers has a causal language model of this type.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    config = language_config(config)
    kind = config.model_type
    check_not_refused(config)
    if kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and kind not in known_types():
        raise _unknown(kind)


def _unknown(kind: str, also: str = "") -> ModelError:
    return ModelError(
        f"no adapter is known for the architecture {kind!r}.{also} `twotower check MODEL "
        "--suggest` looks for one; or write it by subclassing twotower.models.Architecture, and "
        "register it with twotower.models.register"
    )


def language_config(config: Any) -> Any:
    """Return the configuration of the language model in a configuration: itself, or a part.

    Raises
    ------
    ModelError
        If there are several language models.
    """
    try:
        return config.get_text_config(decoder=True)
    except ValueError as error:
        raise ModelError(f"{config.model_type!r} holds several language models") from error


def check_not_refused(config: Any) -> None:
    """Check that a configuration is not of a type that is known not to be supported.

    Raises
    ------
    ModelError
        With the reason.
    """
    if config.model_type in REFUSED:
        raise ModelError(f"{config.model_type!r} is not supported: {REFUSED[config.model_type]}")


def known_types() -> list[str]:
    """Return the values of `config.model_type` that an adapter names."""
    return sorted({kind for adapter in ADAPTERS for kind in adapter.model_types})


def _located(adapter: type[Architecture], config: Any, module: torch.nn.Module) -> Architecture:
    """Return an adapter with its paths in a model."""
    try:
        architecture = adapter(config)
    except AttributeError as error:
        raise ModelError(
            f"{adapter.__name__} cannot read this configuration: it lacks {error.name}"
        ) from error
    layers = range(architecture.n_layers)
    if layers and not any(map(architecture.has_heads, layers)):
        raise ModelError(f"{config.model_type!r} with this configuration: {RECURRENT}")
    for name, path in located(adapter, module).items():
        setattr(architecture, name, path)
    return architecture
