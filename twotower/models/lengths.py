"""Check attention beyond the lengths at which it changes.

Attention may have a window, chunks, or a context length beyond which rotary embeddings or queries
are scaled. Short prompts do not reach these. If the configuration names such a length, the check
runs on longer prompts: in the model itself if the length is short, else in a small random model of
the same kind with shorter lengths.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from ..errors import CheckError
from .check import check_model

if TYPE_CHECKING:
    from ..results.findings import Finding
    from .model import Model

AFFORDABLE = 64
"""Longest length, in positions, that is checked in the model itself."""

SHORTENED = 8
"""First length of the small model; each further length is 1.5 times the previous one."""

NAMES = ("window", "chunk_size", "original_max_position", "context_length", "floor_scale")
"""Parts of the names of settings that hold such lengths."""

NOT_LENGTHS = ("max_window_layers", "chunk_size_feed_forward")

SWITCHING = ("dynamic", "longrope")
"""Kinds of rotary embedding that change at the training context length."""

log = logging.getLogger(__name__)


def named_lengths(config: Any) -> dict[str, int]:
    """Return the lengths in a configuration, by setting name."""
    found: dict[str, int] = {}
    ropes: list[dict[str, Any]] = []

    def look(settings: dict[str, Any]) -> None:
        for name, value in settings.items():
            if isinstance(value, dict):
                ropes.append(value)
                look(value)
            elif _is_length(name, value):
                found[name] = value

    look({k: v for k, v in vars(config).items() if not k.startswith("_")})
    kinds = {rope.get("rope_type", rope.get("type")) for rope in ropes}
    most = getattr(config, "max_position_embeddings", None)
    if kinds & set(SWITCHING) and most and "original_max_position_embeddings" not in found:
        found["max_position_embeddings"] = most
    return found


def _is_length(name: str, value: Any) -> bool:
    whole = isinstance(value, int) and not isinstance(value, bool) and value > 1
    return whole and name not in NOT_LENGTHS and any(part in name for part in NAMES)


def check_lengths(model: Model) -> dict[str, Finding]:
    """Check attention beyond every length in a model's configuration.

    Parameters
    ----------
    model
        A loaded model.

    Returns
    -------
    dict
        As from `check_model`; empty if the configuration names no length.

    Raises
    ------
    CheckError
        If the adapter does not describe attention beyond a length.
    """
    lengths = named_lengths(model.config)
    if not lengths:
        return {}
    longest = max(lengths.values())
    if longest <= AFFORDABLE and not model.quantization and not model.remote:
        return _beyond(model, model, longest, lengths)
    shorter, length = {}, SHORTENED
    for name in sorted(lengths, key=lambda name: lengths[name]):
        shorter[name] = length
        length += length // 2
    small = _small(model, shorter)
    return {} if small is None else _beyond(model, small, max(shorter.values()), lengths)


def _small(model: Model, lengths: dict[str, int]) -> Model | None:
    """Make a small model of the same kind with shorter lengths; None if that fails."""
    from .model import Model
    from .registry import find_architecture
    from .shrink import random_small_model, shrunk
    from .traced import traced

    try:
        module = random_small_model(shrunk(model.config, lengths))
        architecture = find_architecture(module.config, module)
        if type(architecture) is not type(model.architecture):
            return None
        wrapped = traced(module, model.tokenizer)
    except Exception as error:  # any error of the model's code about sizes
        log.info("no small model of %s could be made: %s", model.name, error)
        return None
    return Model(wrapped, model.tokenizer, architecture, model.name)


def _beyond(
    model: Model, proved: Model, longest: int, lengths: dict[str, int]
) -> dict[str, Finding]:
    """Run the check on prompts slightly longer than the longest length and than twice of it."""
    try:
        return check_model(proved, (2 * longest + 5, longest + 2))
    except CheckError as error:
        named = ", ".join(f"{name}={value}" for name, value in lengths.items())
        raise CheckError(
            f"{model.name} changes its attention at a length that the adapter "
            f"{type(model.architecture).__name__} does not describe ({named}): {error}"
        ) from error
