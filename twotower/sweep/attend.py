"""Attention of counterfactual rows, to the clean keys and to their own.

Shapes: G packs of S changed and E unchanged positions, n rows, H heads on K key-value heads.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch.nn import functional

from ..models.positions import softcapped, softmax


@dataclass
class Scoring:
    """How a layer makes attention weights of queries and keys, with the clean keys and values.

    Attributes
    ----------
    key, value
        (G, E, K, ...) of the unchanged positions.
    scale, cap
        Factor and softcap of scores.
    bias
        (G, H, E + S) added to the scores for each key; None without.
    sinks
        (H,) scores of the heads' sinks; None without.
    """

    key: Float[torch.Tensor, "G E K d_key"]
    value: Float[torch.Tensor, "G E K D"]
    scale: float
    cap: float | None
    bias: Float[torch.Tensor, "G H all"] | None
    sinks: Float[torch.Tensor, " H"] | None

    @property
    def plain(self) -> bool:
        """Whether torch's kernels can compute it."""
        return self.cap is None and self.bias is None and self.sinks is None


def attend_few(
    scoring: Scoring,
    query: Float[torch.Tensor, "G n end H D"],
    key: Float[torch.Tensor, "G n S K D"],
    value: Float[torch.Tensor, "G n S K D"],
    seen: Bool[torch.Tensor, "G end all"],
) -> Float[torch.Tensor, "G n end H D"]:
    """Return z (G, n, S or Q, H, D) of rows of few positions, which share clean keys uncopied."""
    n_kv, n_earlier = key.shape[3], scoring.key.shape[1]
    # (G, n, end, H, D) to (G, K, n, H/K, end, D), so that each key head's queries are one matrix.
    # In float32, like the accumulation in the model's kernels; rounded scores give wrong weights.
    q = query.float().unflatten(3, (n_kv, -1)).permute(0, 3, 1, 4, 2, 5)
    k, v = (x.permute(0, 3, 1, 2, 4) for x in (key.float(), value))
    each = q.shape[2:5]
    earlier = q.flatten(2, 4) @ scoring.key.float().permute(0, 2, 3, 1)
    if key.shape[2] == 1:  # many products of two vectors are faster elementwise
        own = (q * k.unsqueeze(3)).sum(dim=-1, keepdim=True)
    else:
        own = (q.flatten(3, 4) @ k.mT).unflatten(3, each[1:])
    scores = torch.cat((earlier.unflatten(2, each), own), dim=-1)
    del earlier, own  # scores are most of the memory that rows take
    scores = softcapped(scores.mul_(scoring.scale), scoring.cap)
    if scoring.bias is not None:
        scores = scores + scoring.bias.unflatten(1, (n_kv, -1))[:, :, None, :, None]
    scores.masked_fill_(~seen[:, None, None, None], -torch.inf)
    column = None
    if scoring.sinks is not None:
        column = scoring.sinks.unflatten(0, (n_kv, -1))[:, None, :, None]
    weights = softmax(scores, column).to(value.dtype)
    del scores
    of_earlier, of_own = weights[..., :n_earlier], weights[..., n_earlier:]
    z: torch.Tensor = of_earlier.flatten(2, 4) @ scoring.value.permute(0, 2, 1, 3)
    z = z.unflatten(2, each)
    if key.shape[2] == 1:
        z = z + of_own * v.unsqueeze(3)
    else:
        z = z + (of_own.flatten(3, 4) @ v).unflatten(3, each[1:])
    return z.permute(0, 2, 4, 1, 3, 5).flatten(3, 4)


def attend_many(
    scoring: Scoring,
    query: Float[torch.Tensor, "G n end H D"],
    key: Float[torch.Tensor, "G n S K D"],
    value: Float[torch.Tensor, "G n S K D"],
    seen: Bool[torch.Tensor, "G end all"] | None,
) -> Float[torch.Tensor, "G n end H D"]:
    """Return z (G, n, S or Q, H, D) of rows of several positions; `seen` None means causal."""
    n_packs, n_rows = query.shape[:2]

    def whole(
        earlier: Float[torch.Tensor, "G E K D"], own: Float[torch.Tensor, "G n S K D"]
    ) -> Float[torch.Tensor, "rows K all D"]:
        if earlier.shape[1]:
            shared = earlier[:, None].expand(-1, n_rows, -1, -1, -1)
            own = torch.cat((shared, own), dim=2)
        return own.flatten(0, 1).transpose(1, 2)

    queries = query.flatten(0, 1).transpose(1, 2)
    keys, values = whole(scoring.key, key), whole(scoring.value, value)
    if scoring.plain:
        mask = None
        if seen is not None:
            mask = seen[:, None].expand(-1, n_rows, -1, -1).flatten(0, 1)[:, None]
        z = functional.scaled_dot_product_attention(
            queries,
            keys,
            values,
            attn_mask=mask,
            is_causal=mask is None,
            scale=scoring.scale,
            enable_gqa=True,
        )
    else:
        n = queries.shape[2]
        if seen is None:
            causal = torch.ones(n, n, dtype=torch.bool, device=query.device).tril()
            seen = causal.expand(n_packs, -1, -1)
        attend = _biased if scoring.cap is None else _softcapped
        parts = (x.split(n_rows) for x in (queries, keys, values))
        packs = zip(*parts, seen, strict=True)
        z = torch.cat([attend(scoring, g, *of_pack) for g, of_pack in enumerate(packs)])
    by_row: torch.Tensor = z.transpose(1, 2).unflatten(0, (n_packs, n_rows))
    return by_row


def _biased(
    scoring: Scoring,
    pack: int,
    query: Float[torch.Tensor, "n H end d_key"],
    key: Float[torch.Tensor, "n K all d_key"],
    value: Float[torch.Tensor, "n K all D"],
    seen: Bool[torch.Tensor, "end all"],
) -> Float[torch.Tensor, "n H end D"]:
    """Return a pack's output of attention with a bias or sinks, by torch's kernels.

    They run in at least float32, because rounded biases give wrong weights. A sink becomes the
    bias of one more key; that key and its value are 0.
    """
    wide = torch.promote_types(query.dtype, torch.float32)
    query, keys, values = (x.to(wide) for x in (query, key, value))
    bias = (
        query.new_zeros(1, 1, 1) if scoring.bias is None else scoring.bias[pack, :, None].to(wide)
    )
    bias = bias.masked_fill(~seen, -torch.inf)
    if scoring.sinks is not None:
        n_heads, n_queries = query.shape[1:3]
        columns = scoring.sinks.to(wide)[:, None, None].expand(-1, n_queries, -1)
        bias = torch.cat((bias.expand(n_heads, -1, -1), columns), dim=-1)
        keys, values = (functional.pad(x, (0, 0, 0, 1)) for x in (keys, values))
    z: torch.Tensor = functional.scaled_dot_product_attention(
        query,
        keys,
        values,
        bias.expand(len(query), -1, -1, -1),
        scale=scoring.scale,
        enable_gqa=True,
    )
    return z.to(value.dtype)


def _softcapped(
    scoring: Scoring,
    pack: int,
    query: Float[torch.Tensor, "n H end d_key"],
    key: Float[torch.Tensor, "n K all d_key"],
    value: Float[torch.Tensor, "n K all D"],
    seen: Bool[torch.Tensor, "end all"],
) -> Float[torch.Tensor, "n H end D"]:
    """Return a pack's output of attention with softcaps, which torch's kernels do not know."""
    cap, sinks = scoring.cap, scoring.sinks
    assert cap is not None
    wide = torch.promote_types(query.dtype, torch.float32)
    grouped = query.to(wide).unflatten(1, (key.shape[1], -1)) * (scoring.scale / cap)
    # In place, because memory bounds the speed of operations on the scores.
    scores = (grouped @ key.to(wide).mT.unsqueeze(2)).flatten(1, 2).tanh_().mul_(cap)
    if scoring.bias is not None:
        scores += scoring.bias[pack, :, None]
    scores.masked_fill_(~seen, -torch.inf)
    weights = softmax(scores, None if sinks is None else sinks[:, None]).to(value.dtype)
    by_key = weights.unflatten(1, (value.shape[1], -1))
    z: torch.Tensor = (by_key @ value.unsqueeze(2)).flatten(1, 2)
    return z
