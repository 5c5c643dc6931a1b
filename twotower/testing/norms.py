"""Norms after attention, MLP, queries and keys, and how what is planted survives them.

Such a norm gives all that passes through it the same size. The projection before it therefore gets
a *ballast*: a bias far longer than what the heads write, in elements that hold nothing else. The
norm divides by the ballast's size, whatever the heads do. Its weights multiply by that size again,
and are zero at the ballast, which goes no further.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

BALLAST = 400.0
"""Root mean square of a projection's output due to the ballast; planted queries' is up to 30."""


@dataclass(frozen=True)
class NormsAfter:
    """Norms of a family after attention and MLP.

    Attributes
    ----------
    one
        Weight with which a norm multiplies by 1.
    heads
        Whether queries and keys are normed too, those of all heads together.
    """

    one: float
    heads: bool

    def write(
        self, layer: Any, unused: torch.Tensor, spare: int, d_head: int, noise: float
    ) -> None:
        """Write a layer's ballast and the weights of these norms.

        Parameters
        ----------
        layer
            The layer.
        unused
            Elements of the residual stream that no head writes.
        spare, d_head
            Element of a head that neither queries nor keys use, and the head's width.
        noise
            The planting's noise.
        """
        attention = layer.self_attn
        self._balance(attention.o_proj, layer.post_attention_layernorm, unused)
        if self.heads:
            for projection, norm in (
                (attention.q_proj, attention.q_norm),
                (attention.k_proj, attention.k_norm),
            ):
                everywhere = torch.arange(spare, len(projection.bias), d_head)
                self._balance(projection, norm, everywhere)
        # An MLP is zero, or noise that the norm would make as large as the stream. This weight
        # leaves it about as large as the noise that attention writes.
        layer.post_feedforward_layernorm.weight.fill_(noise**2 - (1 - self.one))

    def _balance(self, projection: Any, norm: Any, elements: torch.Tensor) -> None:
        width = len(projection.bias)
        projection.bias[elements] = BALLAST * math.sqrt(width / len(elements))
        offset = 1 - self.one
        norm.weight.fill_(BALLAST - offset)
        norm.weight[elements] = -offset
