"""QK scores between positions of a layer, full or only their content part.

Shapes: B prompts of T positions, of which the last n are queries; h of the H heads.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Float32

from ..models.positions import softcapped, softmax
from .views import LayerView


def scores(
    view: LayerView, n: int, heads: Sequence[int] | None = None
) -> Float32[torch.Tensor, "B h {n} T"]:
    """Return (B, h, n, T) float32 QK scores, unmasked; of all heads by default."""
    query = view.turn(view.query[:, -n:], slice(view.query.shape[1] - n, None), query=True)
    found = _product(view, query, view.turned_key, heads)
    bias = view.positions.bias
    if bias is None:
        return found
    keys = _of(bias, heads)
    return found + (keys[:, :, None] - keys[:, :, -n:, None])


def attention(
    view: LayerView,
    scores: Float32[torch.Tensor, "B h n T"],
    heads: Sequence[int] | None = None,
) -> Float32[torch.Tensor, "B h n T"]:
    """Return (B, h, n, T) attention of the last n positions, from their scores."""
    hidden = view.hidden(scores.shape[2])[:, None]
    sinks = None if view.sinks is None else _of(view.sinks[None], heads)[0][:, None]
    return softmax(scores.masked_fill(hidden, -torch.inf), sinks)


def _of(
    x: Float[torch.Tensor, "one H *rest"], heads: Sequence[int] | None
) -> Float[torch.Tensor, "one h *rest"]:
    return x if heads is None else torch.stack([x[:, head] for head in heads], dim=1)


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
    architecture, at = view.architecture, view.positions
    query = architecture.after_rotary(view.block, view.query[:, -n:], query=True).float()
    key = architecture.after_rotary(view.block, view.key, query=False)
    if at.factor is not None:
        query = query * at.factor[:, -n:]
    if at.cos is not None and at.sin is not None:
        cos, sin = at.cos.float(), at.sin.float()
        query = architecture.rotate(query, cos[:, -n:], sin[:, -n:])
        if labels_at is not None:
            cos, sin = (_mean_before(table, labels_at) for table in (cos, sin))
        # A score is linear in the key's rotary table, so the key's rotation can be applied to
        # the query instead, transposed: with the opposite sign of sin.
        query = architecture.rotate(query, cos[:, -n:], -sin[:, -n:])
    return _product(view, query, key, heads)


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
    query: Float[torch.Tensor, "B n H d_key"],
    key: Float[torch.Tensor, "B T K d_key"],
    heads: Sequence[int] | None,
) -> Float32[torch.Tensor, "B h n T"]:
    """Return scaled and capped q.k: (B, n, H, d_key) and (B, T, K, d_key) to (B, h, n, T)."""
    n = query.shape[1]
    if heads is not None:
        per = query.shape[2] // key.shape[2]
        query = torch.stack([query[:, :, head] for head in heads], dim=2)
        key = torch.stack([key[:, :, head // per] for head in heads], dim=2)
    # (B, K, G n, D): the queries of each key head form one matrix.
    grouped = query.float().unflatten(2, (key.shape[2], -1)).permute(0, 2, 3, 1, 4).flatten(2, 3)
    product = grouped @ key.float().permute(0, 2, 3, 1) * view.architecture.scaling(view.index)
    by_head: torch.Tensor = product.unflatten(2, (-1, n)).flatten(1, 2)
    return softcapped(by_head, view.architecture.score_softcap)
