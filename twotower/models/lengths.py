"""Lengths at which a model's attention changes, and a proof on both sides of each.

A window, a chunk, a context beyond which rotary or queries are scaled: a short prompt shows
nothing of them. Where a configuration names such a length, prompts go beyond it: in the model
itself if that is short, else in a small random model of the same kind whose lengths are shorter.
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
"""Positions that a proof in the model itself may take."""

SHORTENED = 8
"""The first length of a small model; each further one is half as long again."""

NAMES = ("window", "chunk_size", "original_max_position", "context_length", "floor_scale")
"""Parts of names of settings that are such lengths."""

NOT_LENGTHS = ("max_window_layers", "chunk_size_feed_forward")

SWITCHING = ("dynamic", "longrope")
"""Kinds of rotary that switch at the context they were trained on."""

log = logging.getLogger(__name__)


def named_lengths(config: Any) -> dict[str, int]:
    """Lengths that a configuration names, by the setting's name."""
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
    """Prove attention beyond every length that a model's configuration names.

    Parameters
    ----------
    model
        A loaded model.

    Returns
    -------
    dict
        As from `check_model`; empty where the configuration names no length.

    Raises
    ------
    CheckError
        If attention is not understood beyond a length.
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
    """A small model of the same kind with shorter lengths; None where none can be made."""
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
    except Exception as error:  # whatever a model's own code says of sizes that do not fit
        log.info("no small model of %s could be made: %s", model.name, error)
        return None
    return Model(wrapped, model.tokenizer, architecture, model.name)


def _beyond(
    model: Model, proved: Model, longest: int, lengths: dict[str, int]
) -> dict[str, Finding]:
    """The check on prompts of more than twice the longest length, and of a little more."""
    try:
        return check_model(proved, (2 * longest + 5, longest + 2))
    except CheckError as error:
        named = ", ".join(f"{name}={value}" for name, value in lengths.items())
        raise CheckError(
            f"{model.name} changes its attention at a length that the adapter "
            f"{type(model.architecture).__name__} does not describe ({named}): {error}"
        ) from error
