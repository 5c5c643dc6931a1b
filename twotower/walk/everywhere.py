"""Tensors that are needed wherever the model is."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch


class Everywhere:
    """A tensor on each of some devices.

    Copied from the host before a walk, which neither waits for copies nor takes them from one
    device to another.

    Parameters
    ----------
    values
        Array or tensor.
    devices
        Where it is wanted. Elsewhere it is copied when it is first asked for: what is made in
        a walk itself, and on a server, the devices of which are not known here.
    """

    def __init__(self, values: Any, devices: Iterable[torch.device]) -> None:
        self.own = values if isinstance(values, torch.Tensor) else torch.as_tensor(values)
        self._on = {device: self.own.to(device) for device in devices}

    def on(self, device: torch.device) -> torch.Tensor:
        """The tensor on a device."""
        if device not in self._on:
            self._on[device] = self.own.to(device)
        return self._on[device]

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> Everywhere:
        """What a function makes of the tensor, on the same devices."""
        return Everywhere(function(self.own), self._on)
