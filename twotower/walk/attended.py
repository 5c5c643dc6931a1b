"""Proof of attention at many positions: weights and values give the heads' own outputs."""

from __future__ import annotations

import torch
from jaxtyping import Float32

from ..models.rounding import Rounding
from .proof import Claim, finite_claims
from .views import LayerView


def claim_attention(
    view: LayerView,
    scores: Float32[torch.Tensor, "B H n T"],
    weights: Float32[torch.Tensor, "B H n T"],
    rounding: Rounding,
) -> Claim:
    """Claim the attention of the last n positions, as a measure has recomputed it.

    Parameters
    ----------
    view
        The layer.
    scores, weights
        (B, H, n, T) recomputed scores, unmasked, and attention.
    rounding
        Errors that the model's arithmetic allows.

    Returns
    -------
    Claim
        Each head's worst position; padding counts as right.
    """
    n, tiny = weights.shape[2], torch.finfo(torch.float32).tiny
    value = view.value.float().transpose(1, 2)  # (B, K, T, D)
    grouped = weights.unflatten(1, (value.shape[1], -1)).flatten(2, 3)
    shape = weights.shape[:3]
    again = (grouped @ value).reshape(*shape, -1)
    length = (grouped @ value.norm(dim=-1, keepdim=True)).reshape(shape)
    own = view.own_z[:, -n:].transpose(1, 2).float()
    if view.gate is not None:
        gate = view.gate[:, -n:].transpose(1, 2).float()
        again, length = again * gate, length * gate.abs().amax(dim=-1)
    error = (own - again).norm(dim=-1) / length.clamp(min=tiny)
    error = error.masked_fill(~view.real[:, None, -n:], 0)
    size = scores.masked_fill(view.hidden(n)[:, None], 0).abs().amax(dim=-1)
    if view.positions.bias is not None:
        size = size + view.positions.bias.abs().amax(dim=-1)[..., None]
    query = view.turn(view.query[:, -n:], slice(view.query.shape[1] - n, None), query=True)
    norms = query.float().norm(dim=-1).transpose(1, 2)  # (B, H, n)
    keys = view.turned_key.float().norm(dim=-1).masked_fill(~view.real[..., None], 0).amax(dim=1)
    largest = keys.repeat_interleave(norms.shape[1] // keys.shape[1], dim=1)[..., None]
    products = norms * largest * view.architecture.scaling(view.index)
    allowed = rounding.attention(view.own_z.dtype, size, products)
    error, allowed = finite_claims(own, error, allowed)
    strain = (error / allowed).where(error != 0, 0)
    worst = strain.argmax(dim=-1, keepdim=True)
    found = [x.gather(-1, worst)[..., 0] for x in (error, allowed)]
    return Claim("attention", [view.index], found[0][None], found[1][None])
