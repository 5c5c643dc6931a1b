"""Copying: whether a vector's logits are largest, or smallest, for the token that it comes from.

Only the ends of the ranking count, so most vectors need no unembedding over the whole vocabulary:
if enough of a thousand sampled tokens have clearly larger logits than the vector's own token, and
enough have clearly smaller ones, then the own token is at neither end. The sampled tokens' weights
are read once for each batch. The other vectors are unembedded over the whole vocabulary.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int

from ..walk.memory import UNEMBED_BYTES
from ..walk.views import End

TOP = 5
"""Number of tokens among which a copied or suppressed token must be (Wang et al. 2022)."""

SAMPLED = 1024
"""Number of tokens in the sample."""


def own_token_ends(
    vectors: Float[torch.Tensor, "n d_model"], tokens: Int[torch.Tensor, " n"], end: End
) -> tuple[Float[torch.Tensor, " n"], Float[torch.Tensor, " n"]]:
    """Return 1 where a token is among the `TOP` with the largest logit, and with the smallest.

    Elsewhere 0. An equal logit of another token counts half, so a zero vector has neither.

    Parameters
    ----------
    vectors
        (n, d_model) vectors after the final norm, without its shift.
    tokens
        (n,) the token of each.
    end
        The end of the walk.
    """
    n_tokens, n = end.logits.shape[-1], len(vectors)
    bias = end.unembedding(torch.zeros_like(vectors[:1], dtype=end.dtype))
    at_a_time = max(1, UNEMBED_BYTES // (8 * n_tokens))
    rows = torch.arange(n, device=vectors.device)
    if n_tokens > 4 * SAMPLED and n > 2 * vectors.shape[-1]:
        rows = rows[_may_be_at_an_end(vectors, tokens, end, bias, at_a_time)]
    # How many more tokens have a larger logit than have a smaller one.
    excess = torch.zeros(n, dtype=torch.int64, device=vectors.device)
    for some in rows.split(at_a_time):
        logits = end.unembedding(vectors[some].to(end.dtype)) - bias
        own = logits.gather(1, tokens[some].to(logits.device)[:, None])
        found = (logits > own).sum(dim=-1) - (logits < own).sum(dim=-1)
        excess[some] = found.to(excess.device)
    least = n_tokens - 1 - 2 * TOP
    return (excess < -least).float(), (excess > least).float()


def _may_be_at_an_end(
    vectors: Float[torch.Tensor, "n d_model"],
    tokens: Int[torch.Tensor, " n"],
    end: End,
    bias: Float[torch.Tensor, "1 vocabulary"],
    at_a_time: int,
) -> torch.Tensor:
    """Return (n,) False where the sample shows that a token is at neither end."""
    width, device = vectors.shape[-1], vectors.device
    sample = torch.linspace(0, end.logits.shape[-1] - 1, SAMPLED, device=bias.device).long()
    known, column = tokens.to(bias.device).unique(return_inverse=True)
    ids = torch.cat((sample, known))
    weights = []
    for start in range(0, width, at_a_time):
        size = min(at_a_time, width - start)
        probe = torch.zeros(size, width, dtype=end.dtype, device=device)
        probe.diagonal(start).fill_(1)
        weights.append((end.unembedding(probe)[:, ids] - bias[:, ids]).float())
    weight = torch.cat(weights).to(device)
    own_weight, column = weight[:, SAMPLED:], column.to(device)
    # Where rounding could decide, the whole vocabulary does.
    rounding = 16 * torch.finfo(end.dtype).eps
    found = []
    for some, its in zip(vectors.split(4 * at_a_time), column.split(4 * at_a_time), strict=True):
        logits = some.float() @ weight[:, :SAMPLED]
        own = (some.float() @ own_weight).gather(1, its[:, None])
        margin = rounding * torch.maximum(logits.abs().amax(dim=-1, keepdim=True), own.abs())
        larger = (logits > own + margin).sum(dim=-1)
        smaller = (logits < own - margin).sum(dim=-1)
        found.append((larger < TOP) | (smaller < TOP))
    return torch.cat(found)
