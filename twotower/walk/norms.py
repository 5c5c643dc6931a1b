"""Norms of the residual stream as linear maps, once their statistic is known.

A LayerNorm or RMSNorm maps x to ``scale * (x - mean) / statistic + shift``, without the mean in an
RMSNorm. With a fixed ("frozen") statistic this is linear, so the parts of x can be attributed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Float32


@dataclass
class Norm:
    """Weights of a norm.

    Attributes
    ----------
    scale, shift
        (d_model,) weight and bias.
    centred
        Whether the norm subtracts the mean.
    epsilon
        Constant under the square root of the statistic.
    """

    scale: Float[torch.Tensor, " d_model"]
    shift: Float[torch.Tensor, " d_model"]
    centred: bool
    epsilon: float

    def on(self, device: torch.device) -> Norm:
        """Return the norm with its weights on a device."""
        return replace(self, scale=self.scale.to(device), shift=self.shift.to(device))

    def statistic(self, x: Float[torch.Tensor, "*rest d_model"]) -> Float32[torch.Tensor, "*rest"]:
        """Return the root of the mean square (...,) of x (..., d_model), in float32."""
        x = self._centre(x.float())
        return (x.square().mean(dim=-1) + self.epsilon).sqrt()

    def frozen(
        self, x: Float[torch.Tensor, "*rest d_model"], statistic: Float[torch.Tensor, "*#rest"]
    ) -> Float32[torch.Tensor, "*rest d_model"]:
        """Return the norm of x (..., d_model) with a given statistic (...,)."""
        return self._centre(x.float()) / statistic.unsqueeze(-1) * self.scale + self.shift

    def pull(
        self, directions: Float[torch.Tensor, "label d_model"]
    ) -> Float[torch.Tensor, "label d_model"]:
        """Return directions before the norm, from directions after it; divide by the statistic."""
        return self._centre(directions * self.scale)

    def _centre(self, x: torch.Tensor) -> torch.Tensor:
        return x - x.mean(dim=-1, keepdim=True) if self.centred else x


def probe_norm(
    norm: Any, like: Float[torch.Tensor, "*rest d_model"], epsilon: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return scale, shift and whether a norm centres, by calling it. Only works inside a trace.

    Parameters
    ----------
    norm
        The norm.
    like
        A tensor on the norm's device, in the dtype of its input.
    epsilon
        The norm's epsilon.
    """
    zero = torch.zeros(1, like.shape[-1], dtype=like.dtype, device=like.device)
    # The norm maps a vector of mean 0 and variance 1 to plus and minus its weight, whether it
    # centres or not. It maps a vector of ones to its bias only if it centres.
    signs = torch.ones_like(zero)
    signs[:, 1::2] = -1
    shift = norm(zero).float()[0]
    scale = (norm(signs).float()[0] - shift) * signs[0].float() * (1 + epsilon) ** 0.5
    centred = (norm(torch.ones_like(zero)).float()[0] - shift).abs().max() < 0.1 * scale.abs().max()
    return scale, shift, centred
