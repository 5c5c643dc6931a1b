"""Subtract parts from a sum without leaving its rounding error behind.

A residual stream is a sum that a model rounds at every step. Where nearly all of it is taken out,
the rounding error would be left, and a norm would make it as large as any stream. So the error is
shared: what is left keeps as much of it as it has of the sum's energy.
"""

from __future__ import annotations

import torch
from jaxtyping import Float


def wide(device: torch.device) -> torch.dtype:
    """Return the widest dtype of a device; Apple's GPUs have no float64."""
    return torch.float32 if device.type == "mps" else torch.float64


def at_least_float32(x: Float[torch.Tensor, "*any"]) -> Float[torch.Tensor, "*any"]:
    """Return x in float32, or as it is in float64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def take_out(
    whole: Float[torch.Tensor, "*#rest d"],
    rounding: Float[torch.Tensor, "*#rest d"] | None,
    lost: Float[torch.Tensor, "*rest d"],
) -> Float[torch.Tensor, "*rest d"]:
    """Return what is left of a sum, in the dtype of `lost`.

    Parameters
    ----------
    whole
        (..., d) the sum, as the model computed it.
    rounding
        (..., d) the sum less its exact value; None to leave all of it.
    lost
        (..., d) parts to take out. Where they are 0, the whole is returned.
    """
    if rounding is None:
        return whole.to(lost.dtype) - lost
    rounding = rounding.to(lost.dtype)
    left = whole.to(lost.dtype) - rounding - lost
    gone, there = (x.square().sum(dim=-1, keepdim=True) for x in (lost, left))
    share = gone / (gone + there).clamp(min=torch.finfo(lost.dtype).tiny)
    return left + (1 - share) * rounding
