"""How a layer's scores depend on positions, which keys are visible, and how weights are made."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float


@dataclass
class Positions:
    """Tensors by which a layer's scores depend on positions.

    Attributes
    ----------
    cos, sin
        (B or 1, T, 1, rotated) rotary tables, or None.
    factor
        (B or 1, T, 1, 1) factor on the queries, or None.
    bias
        (B or 1, H, T) added to the scores for each key, or None.
    """

    cos: Float[torch.Tensor, "*at 1 rotated"] | None = None
    sin: Float[torch.Tensor, "*at 1 rotated"] | None = None
    factor: Float[torch.Tensor, "*at 1 1"] | None = None
    bias: Float[torch.Tensor, "#B H T"] | None = None

    def tables(self, select: Callable[[torch.Tensor], torch.Tensor]) -> Positions:
        """Return the same with tables and factor (B or 1, T, 1, ...) selected by a function."""
        cos, sin, factor = (
            None if x is None else select(x) for x in (self.cos, self.sin, self.factor)
        )
        return Positions(cos, sin, factor, self.bias)

    def first(self, n: int) -> Positions:
        """Return the same of the first n positions."""
        found = self.tables(lambda table: table[:, :n])
        found.bias = None if self.bias is None else self.bias[:, :, :n]
        return found


def softcapped(x: Float[torch.Tensor, "*any"], cap: float | None) -> Float[torch.Tensor, "*any"]:
    """Return c tanh(x / c), or x itself for None."""
    return x if cap is None else cap * torch.tanh(x / cap)


def softmax(
    scores: Float[torch.Tensor, "*rest n keys"],
    sinks: Float[torch.Tensor, "*#rest 1"] | None = None,
) -> Float[torch.Tensor, "*rest n keys"]:
    """Return attention weights (..., n, keys) from masked scores.

    Parameters
    ----------
    scores
        (..., n, keys), -inf where a key is hidden.
    sinks
        (..., 1) score of a column without a key, which takes a share of the weight; None without.
    """
    if sinks is None:
        return scores.softmax(dim=-1)
    column = sinks.to(scores.dtype).unsqueeze(-1).expand(*scores.shape[:-1], 1)
    return torch.cat((scores, column), dim=-1).softmax(dim=-1)[..., :-1]


def visible(
    mask: Bool[torch.Tensor, "B T"],
    n_queries: int,
    window: int | None = None,
    chunk: int | None = None,
) -> Bool[torch.Tensor, "B {n_queries} T"]:
    """Return (B, n_queries, T) boolean: keys visible to the last n_queries positions.

    Every query sees itself, even at padding, so that no row of the softmax is empty.
    """
    width = mask.shape[1]
    columns = torch.arange(width, device=mask.device)
    queries = columns[width - n_queries :, None]
    seen = columns <= queries
    if window is not None:
        seen &= queries - columns < window
    if chunk is not None:
        numbers = (mask.cumsum(dim=-1) - 1).div(chunk, rounding_mode="floor")
        seen = seen & (numbers[:, width - n_queries :, None] == numbers[:, None])
    return (seen & mask[:, None]) | (columns == queries)
