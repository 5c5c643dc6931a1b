"""Attention of the last position, recomputed from queries, keys and values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Float32

from ..models.positions import Positions, softcapped, softmax
from .once import once

if TYPE_CHECKING:
    from ..models import Architecture


@dataclass
class LastAttention:
    """Attention of the last position to all T positions, for B prompts, in one layer.

    Attributes
    ----------
    index, block
        Number of the layer, and nnsight's envoy of its block.
    query
        (B, H, d_key) queries of the last position, before rotary.
    key, value
        (B, T, K, d_key) keys before rotary, and (B, T, K, D) values.
    positions
        Tensors by which the scores of T positions depend on positions.
    hidden
        (B, 1, T) boolean: keys that the last position does not see.
    gate
        (B, H, D or 1) factor on the heads' outputs; None without.
    sinks
        (H,) score of the heads' sinks; None without.
    """

    architecture: Architecture
    index: int
    block: Any
    query: Float[torch.Tensor, "B H d_key"]
    key: Float[torch.Tensor, "B T K d_key"]
    value: Float[torch.Tensor, "B T K D"]
    positions: Positions
    hidden: Bool[torch.Tensor, "B 1 T"]
    gate: Float[torch.Tensor, "B H gated"] | None = None
    sinks: Float[torch.Tensor, " H"] | None = None

    @once
    def turned_key(self) -> Float[torch.Tensor, "B T K d_key"]:
        """(B, T, K, d_key) keys after rotary."""
        # In memory head by head: so they are rotated and multiplied without further copies.
        by_head = self.key.transpose(1, 2).contiguous().transpose(1, 2)
        return self.architecture.turn(self.block, by_head, self.positions, query=False)

    @once
    def turned_query(self) -> Float[torch.Tensor, "B H d_key"]:
        """(B, H, d_key) queries after rotary."""
        at = self.positions.tables(lambda table: table[:, -1:])
        return self.architecture.turn(self.block, self.query[:, None], at, query=True)[:, 0]

    @once
    def scores(self) -> Float32[torch.Tensor, "B H T"]:
        """(B, H, T) float32 QK scores, unmasked."""
        grouped = self.turned_query.float().unflatten(1, (self.key.shape[2], -1))
        product = grouped @ self.turned_key.float().permute(0, 2, 3, 1)
        scores: torch.Tensor = product.flatten(1, 2) * self.architecture.scaling(self.index)
        scores = softcapped(scores, self.architecture.score_softcap)
        bias = self.positions.bias
        return scores if bias is None else scores + (bias - bias[:, :, -1:])

    @once
    def visible_scores(self) -> Float32[torch.Tensor, "B H T"]:
        """(B, H, T) scores, 0 at hidden keys."""
        scores: torch.Tensor = self.scores
        return scores.masked_fill(self.hidden, 0)

    @once
    def score_size(self) -> Float32[torch.Tensor, "B H"]:
        """(B, H) largest absolute score of a visible key, with its bias."""
        scores: torch.Tensor = self.visible_scores
        size = scores.abs().amax(dim=-1)
        bias = self.positions.bias  # models add it to the scores before they subtract the largest
        return size if bias is None else size + bias.abs().amax(dim=-1)

    @once
    def product_size(self) -> Float32[torch.Tensor, "B H"]:
        """(B, H) largest product of the norms of query and visible key, times the scaling."""
        n_kv = self.key.shape[2]
        # In float32, or in float64 for a float64 model: torch refuses to narrow in a norm.
        wide = torch.promote_types(self.key.dtype, torch.float32)
        norms = self.turned_key.norm(dim=-1, dtype=wide).float()
        largest = norms.masked_fill(self.hidden[:, 0, :, None], 0).amax(dim=1)
        query = self.turned_query.norm(dim=-1, dtype=wide).float().unflatten(1, (n_kv, -1))
        products: torch.Tensor = (query * largest.unsqueeze(-1)).flatten(1)
        return products * self.architecture.scaling(self.index)

    @once
    def weights(self) -> Float32[torch.Tensor, "B H T"]:
        """(B, H, T) float32 attention weights."""
        scores = self.scores.masked_fill(self.hidden, -torch.inf)
        sinks = None if self.sinks is None else self.sinks[:, None]
        return softmax(scores[:, :, None], sinks)[:, :, 0]

    @property
    def computed(self) -> bool:
        """Whether the weights are known already."""
        return "_weights" in self.__dict__

    @property
    def n_bytes(self) -> int:
        """Bytes of keys and values, and of what else their memory holds."""
        return sum(x.untyped_storage().nbytes() for x in (self.key, self.value))
