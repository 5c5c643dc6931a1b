"""QK scores between positions of a layer, full or only their content part.

Shapes: B prompts of T positions, of which the last n are queries; h of the H heads.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Float32

from .walk import LayerView


def scores(
    view: LayerView, n: int, heads: Sequence[int] | None = None
) -> Float32[torch.Tensor, "B h {n} T"]:
    """Return (B, h, n, T) float32 QK scores, scaled, unmasked; of all heads by default."""
    query = view.rotate(view.query[:, -n:], slice(view.query.shape[1] - n, None))
    return _product(view, query, view.rotated_key, heads)


def content_scores(
    view: LayerView,
    n: int,
    heads: Sequence[int] | None = None,
    labels_at: Bool[torch.Tensor, "B T"] | None = None,
) -> Float32[torch.Tensor, "B h {n} T"]:
    """Return (B, h, n, T) float32 content part of QK scores (`score_content` in the schema).

    Parameters
    ----------
    view
        The layer.
    n
        Number of query positions, counted from the end.
    heads
        Head numbers; all by default.
    labels_at
        (B, T) boolean, for rotary models only: average over the distances to these positions, up
        to the query. The distance is 0 if there are none, and by default.
    """
    if view.learned is not None:
        query, key = view.content
        return _product(view, query[:, -n:], key, heads)
    query = view.query[:, -n:].float()
    if view.cos is not None and view.sin is not None:
        rotate = view.architecture.rotate
        cos, sin = view.cos.float(), view.sin.float()
        query = rotate(query, cos[:, -n:], sin[:, -n:])
        if labels_at is not None:
            cos, sin = (_mean_before(table, labels_at) for table in (cos, sin))
        # A score is linear in the key's rotary table, so the key's rotation can be applied to
        # the query instead, transposed: with the opposite sign of sin.
        query = rotate(query, cos[:, -n:], -sin[:, -n:])
    return _product(view, query, view.key, heads)


def _mean_before(
    table: Float[torch.Tensor, "#B T 1 rotated"], at: Bool[torch.Tensor, "B T"]
) -> Float[torch.Tensor, "B T 1 rotated"]:
    """Return the mean of a rotary table over the positions `at` up to each position."""
    weight = at.float()[:, :, None, None]
    count = weight.cumsum(dim=1)
    mean = (table * weight).cumsum(dim=1) / count.clamp(min=1)
    return torch.where(count > 0, mean, table)


def _product(
    view: LayerView,
    query: Float[torch.Tensor, "B n H D"],
    key: Float[torch.Tensor, "B T K D"],
    heads: Sequence[int] | None,
) -> Float32[torch.Tensor, "B h n T"]:
    """Return q.k times the scaling: (B, n, H, D) and (B, T, K, D) to (B, h, n, T)."""
    n = query.shape[1]
    if heads is not None:
        per = query.shape[2] // key.shape[2]
        query = torch.stack([query[:, :, head] for head in heads], dim=2)
        key = torch.stack([key[:, :, head // per] for head in heads], dim=2)
    # (B, K, G n, D): the queries of each key head form one matrix.
    grouped = query.float().unflatten(2, (key.shape[2], -1)).permute(0, 2, 3, 1, 4).flatten(2, 3)
    product = grouped @ key.float().permute(0, 2, 3, 1) * view.architecture.scaling(view.index)
    by_head: torch.Tensor = product.unflatten(2, (-1, n)).flatten(1, 2)
    return by_head
