"""Values at a layer's last positions that the proof keeps until its claims are made.

Shapes: B prompts of T positions, H heads on K key-value heads, D elements of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Float32

from ..models.rounding import coarsest, roundoff
from .last import LastAttention
from .views import LayerView, PassingView


@dataclass
class Kept:
    """Values at the last positions of a layer, kept until the claims are made.

    The claims of all layers are made together after the last layer, because starting an operation
    on a few vectors costs more than the operation itself.

    Attributes
    ----------
    index
        Number of the layer.
    sums
        (3, B, d_model) residual stream entering the block, and what attention and MLP add to it.
    entered
        (B, d_model) residual stream entering the block, before edits of it; None without edits.
    dtype
        Coarsest dtype of `sums`.
    heads
        Values of the heads; None in a layer without heads.
    factor
        Factor on the residual stream that leaves the layer; None without.
    """

    index: int
    sums: Float[torch.Tensor, "3 B d_model"]
    dtype: torch.dtype
    entered: Float[torch.Tensor, "B d_model"] | None = None
    heads: Heads | None = None
    factor: Float[torch.Tensor, ""] | None = None

    @classmethod
    def of(
        cls, view: LayerView | PassingView, device: torch.device, parts: Sequence[torch.Tensor]
    ) -> Kept:
        """Return copies, because views would keep the whole residual stream in memory."""
        finest = min((x.dtype for x in parts), key=roundoff)
        sums = torch.stack([x[:, -1].to(device, finest) for x in parts])
        entered = None
        if view.entered is not None:
            entered = view.entered[:, -1].to(device, finest, copy=True)
        return cls(view.index, sums, coarsest(*parts), entered)

    @property
    def left(self) -> Float[torch.Tensor, "B d_model"]:
        """Residual stream that left the block before."""
        return self.sums[0] if self.entered is None else self.entered

    @property
    def kind(self) -> tuple[Any, ...]:
        """Layers of the same kind can be compared together."""
        heads = self.heads
        of_heads = None if heads is None else (heads.own_z.dtype, heads.own_z.shape)
        return self.sums.device, of_heads


@dataclass
class Heads:
    """Values of a layer's heads at the last positions.

    Attributes
    ----------
    own_z, z
        (B, H, D) heads' outputs, as computed by the model and after edits.
    write
        (B, d_model) what attention adds to the residual stream.
    output
        (B, d_model) attention's output before a norm; None if no norm follows.
    dtype
        Coarsest dtype of `z` and attention output.
    """

    own_z: Float[torch.Tensor, "B H D"]
    z: Float[torch.Tensor, "B H D"]
    write: Float[torch.Tensor, "B d_model"]
    output: Float[torch.Tensor, "B d_model"] | None
    dtype: torch.dtype

    @classmethod
    def of(cls, view: LayerView) -> Heads:
        """Return copies, because views would keep the whole residual stream in memory."""
        assert view.attention_output is not None
        assert view.attention_write is not None
        own_z = view.own_z[:, -1].clone()
        z = own_z if view.z is view.own_z else view.z[:, -1].clone()
        output = None
        if view.architecture.attention_post_norm(view.block) is not None:
            output = view.attention_output[:, -1].clone()
        write = view.attention_write[:, -1].to(view.z.device)
        return cls(own_z, z, write.clone(), output, coarsest(view.z, view.attention_output))


@dataclass
class Again:
    """Outputs of the heads at the last positions, recomputed.

    Attributes
    ----------
    z
        (B, H, D) heads' outputs from queries, keys and values.
    length
        (B, H) mean norm of the attended values.
    score, products
        (B, H) largest absolute attended score, and largest product of the norms of query and key.
    slope
        (B, H, D) derivative of `z` with respect to the logarithm of the scores' scale; only in
        a coarse dtype.
    """

    z: Float32[torch.Tensor, "B H D"]
    length: Float32[torch.Tensor, "B H"]
    score: Float32[torch.Tensor, "B H"]
    products: Float32[torch.Tensor, "B H"]
    slope: Float32[torch.Tensor, "B H D"] | None

    @classmethod
    def of(cls, last: LastAttention, coarse: bool) -> Again:
        """Return the outputs of a layer's heads."""
        weights, value = last.weights, last.value.float()
        again = _attended(weights, value)
        norms = value.norm(dim=-1).transpose(1, 2).unsqueeze(-1)  # (B, K, T, 1)
        length = (weights.unflatten(1, (norms.shape[1], -1)) @ norms).flatten(1)
        gate = 1.0 if last.gate is None else last.gate.float()
        if last.gate is not None:
            again, length = again * gate, length * last.gate.float().abs().amax(dim=-1)
        slope = None
        if coarse:
            shown = last.visible_scores
            change = weights * (shown - (weights * shown).sum(dim=-1, keepdim=True))
            slope = _attended(change, value) * gate
        return cls(again, length, last.score_size, last.product_size, slope)


def _attended(
    weights: Float32[torch.Tensor, "B H T"], value: Float32[torch.Tensor, "B T K D"]
) -> Float32[torch.Tensor, "B H D"]:
    """Return the heads' weighted sums of their own values.

    Every head first sums the values of all key-value heads: one product of matrices as they are
    in memory takes less time than copying them head by head.
    """
    n_kv = value.shape[2]
    every = (weights @ value.flatten(2)).unflatten(1, (n_kv, -1)).unflatten(-1, (n_kv, -1))
    own: torch.Tensor = every.diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2)
    return own.flatten(1, 2)
