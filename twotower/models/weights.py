"""A hash of a model's weights that reads every element."""

from __future__ import annotations

import hashlib

import torch

from .state import saved_of

WIDTH = 512
"""Number of integers in a row of those that are summed."""


def hash_weights(root: torch.nn.Module) -> str:
    """Return a hash of all weights and saved buffers of a model.

    The bits of a tensor are read as rows of integers, which are summed by row and by column: a
    change of any element changes the hash. The same weights have the same hash on every device.

    Returns
    -------
    str
        Empty if weights are offloaded, or on a server: they cannot be read then.
    """
    tensors = saved_of(root)
    if any(tensor.is_meta for tensor in tensors):
        return ""
    sums = [part for tensor in tensors for part in _sums(tensor.detach())]
    on_cpu: dict[int, torch.Tensor] = {}
    for device in {x.device for x in sums}:  # one copy from each
        there = {number: x for number, x in enumerate(sums) if x.device == device}
        joined = torch.cat(list(there.values())).cpu().split([len(x) for x in there.values()])
        on_cpu |= dict(zip(there, joined, strict=True))
    found = hashlib.blake2b(digest_size=16)
    for number in range(len(sums)):
        found.update(on_cpu[number].numpy().tobytes())
    return found.hexdigest()


def _sums(tensor: torch.Tensor) -> list[torch.Tensor]:
    """Return sums of a tensor's bits, as integers of 64 bits, and the bits that fill no row."""
    flat = tensor.to_dense() if tensor.layout != torch.strided else tensor
    flat = (torch.view_as_real(flat) if flat.is_complex() else flat).contiguous().flatten()
    row = WIDTH * 8 // flat.element_size()
    rows, rest = flat[: len(flat) // row * row], flat[len(flat) // row * row :]
    if rows.storage_offset() * rows.element_size() % 8:
        rows = rows.clone()
    bits = rows.view(torch.int64).view(-1, WIDTH)
    return [bits.sum(dim=0), bits.sum(dim=1), rest.view(torch.uint8).to(torch.int64)]
