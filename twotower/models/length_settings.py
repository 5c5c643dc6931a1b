"""Settings of a configuration that hold a length at which attention changes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

NAMES = ("window", "chunk_size", "original_max_position", "context_length", "floor_scale")
"""Parts of the names of settings that hold such lengths."""

NOT_LENGTHS = ("max_window_layers", "chunk_size_feed_forward")

SHORTENED = 8
"""First shortened length; each further one is 1.5 times the previous one."""

SWITCHING = ("dynamic", "longrope")
"""Kinds of rotary embedding that change at the training context length."""


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


def shortened(lengths: Mapping[str, int]) -> dict[str, int]:
    """Return short lengths in the same order."""
    found, length = {}, SHORTENED
    for name in sorted(lengths, key=lambda name: lengths[name]):
        found[name] = length
        length += length // 2
    return found
