"""Tensors with a copy on every device of the model."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch


class Everywhere:
    """A tensor with copies on several devices.

    Copies are made from the CPU before a walk, so that the walk neither waits for them nor copies
    between devices.

    Parameters
    ----------
    values
        Array or tensor.
    devices
        Devices that get a copy now. Others get one at first use: for tensors made during a walk,
        and on a server, whose devices are unknown here.
    """

    def __init__(self, values: Any, devices: Iterable[torch.device]) -> None:
        self.own = values if isinstance(values, torch.Tensor) else torch.as_tensor(values)
        self._on = {device: self.own.to(device) for device in devices}

    def on(self, device: torch.device) -> torch.Tensor:
        """Return the tensor on a device."""
        if device not in self._on:
            self._on[device] = self.own.to(device)
        return self._on[device]

    def take(self, x: torch.Tensor) -> torch.Tensor:
        """Return x (B, T, ...) at this tensor, an index (...,) into its flattened (B T) positions.

        The result is a copy.
        """
        return x.flatten(0, 1)[self.on(x.device)]

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> Everywhere:
        """Apply a function to the tensor and return the result on the same devices."""
        return Everywhere(function(self.own), self._on)
