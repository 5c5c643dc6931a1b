"""peft adapters in a model: their names, kinds and weight hashes."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator
from typing import Any

import torch


def adapters_of(module: torch.nn.Module) -> list[dict[str, Any]]:
    """Return the peft adapters of a model, for the provenance.

    Returns
    -------
    list of dict
        For each adapter: name, kind ("lora"), number of modules where it is active, number
        where it is merged, and SHA-256 of its weights.
    """
    found: dict[str, dict[str, Any]] = {}
    hashes: dict[str, Any] = {}
    for path, layer in _layers(module):
        merged = set(getattr(layer, "merged_adapters", ()))
        for name, tensors in _weights(layer):
            kind = type(layer).__module__.split(".")[2]
            about = found.setdefault(name, {"name": name, "kind": kind, "active": 0, "merged": 0})
            about["active"] += name in layer.active_adapters and not layer.disable_adapters
            about["merged"] += name in merged
            own = hashes.setdefault(name, hashlib.sha256())
            own.update(path.encode())
            for tensor in tensors:
                own.update(tensor.detach().contiguous().cpu().flatten().view(torch.uint8).numpy())
    return [{**about, "sha256": hashes[name].hexdigest()} for name, about in found.items()]


def _layers(module: torch.nn.Module) -> Iterator[tuple[str, Any]]:
    tuners = sys.modules.get("peft.tuners.tuners_utils")
    if tuners is not None:
        for path, part in module.named_modules():
            if isinstance(part, tuners.BaseTunerLayer):
                yield path, part


def _weights(layer: Any) -> Iterator[tuple[str, list[torch.Tensor]]]:
    """Iterate over the adapters of a layer, each with its tensors."""
    every: list[Any] = [getattr(layer, name, None) for name in layer.adapter_layer_names]
    holders = [holder for holder in every if hasattr(holder, "keys")]
    for name in dict.fromkeys(key for holder in holders for key in holder.keys()):  # noqa: SIM118
        parts = [holder[name] for holder in holders if name in holder]
        tensors = [
            tensor
            for part in parts
            for tensor in (part.parameters() if isinstance(part, torch.nn.Module) else [part])
        ]
        yield name, tensors
