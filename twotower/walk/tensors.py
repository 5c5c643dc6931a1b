"""Tensor operations that recorders share."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int

from .batch import Batch
from .views import End


def margin(
    logits: Float[torch.Tensor, "B *rest label"], gold: Int[torch.Tensor, " B"]
) -> Float[torch.Tensor, " B *rest"]:
    """Return the right label's logit minus the largest other one: (B, ..., label) to (B, ...).

    Of one label, which then needs its log-probability, return the value itself.
    """
    if logits.shape[-1] == 1:
        return logits[..., 0]
    is_gold = torch.arange(logits.shape[-1], device=logits.device) == gold[:, None]
    is_gold = is_gold.view(len(gold), *[1] * (logits.dim() - 2), -1)
    right = logits.masked_fill(~is_gold, -torch.inf).amax(dim=-1)
    return right - logits.masked_fill(is_gold, -torch.inf).amax(dim=-1)


def above_mean(
    logits: Float[torch.Tensor, "B *rest label"], gold: Int[torch.Tensor, " B"]
) -> Float[torch.Tensor, " B *rest"]:
    """Return the right label's logit less the mean of the others': (B, ..., label) to (B, ...).

    The same of directions. Of one label, return the value itself.
    """
    index = gold.view(-1, *[1] * (logits.dim() - 1)).expand(*logits.shape[:-1], 1)
    right = logits.gather(-1, index)[..., 0]
    others: torch.Tensor = (logits.sum(dim=-1) - right) / max(logits.shape[-1] - 1, 1)
    return right - others


def stack(
    by_layer: list[Float[torch.Tensor, " B *rest"]], end: End
) -> Float[torch.Tensor, "B layer *rest"]:
    """Return the tensors of all layers, which may be on several devices, as (B, layer, ...)."""
    return torch.stack([x.to(end.residual.device) for x in by_layer], dim=1)


def stack_heads(
    by_layer: list[Float[torch.Tensor, "B H *rest"]], end: End
) -> Float[torch.Tensor, "B layer widest *rest"]:
    """Return the tensors of all layers with heads as (B, layer, widest, ...).

    NaN fills layers without heads, and heads that a layer lacks.
    """
    layers, widest = [layer for layer, n in enumerate(end.heads_in) if n], max(end.heads_in)
    whole = [_widened(x.to(end.residual.device), widest) for x in by_layer]
    stacked = torch.stack(whole, dim=1)
    if len(layers) == len(end.heads_in):
        return stacked
    shape = (len(stacked), len(end.heads_in), *stacked.shape[2:])
    filled = stacked.new_full(shape, torch.nan)
    filled[:, layers] = stacked
    return filled


def _widened(x: Float[torch.Tensor, "B H *rest"], n: int) -> Float[torch.Tensor, "B n *rest"]:
    if x.shape[1] == n:
        return x
    missing = x.new_full((len(x), n - x.shape[1], *x.shape[2:]), torch.nan)
    return torch.cat((x, missing), dim=1)


def keep(
    values: Float[torch.Tensor, "B *rest T"], batch: Batch
) -> Float[torch.Tensor, "B *rest kept"]:
    """Return values (B, ..., T) at the columns that the batch keeps; NaN where there is none."""
    if batch.kept is None:
        return values
    kept = batch.kept.on(values.device)
    shape = (len(kept), *[1] * (values.dim() - 2), -1)
    index = kept.clamp(min=0).view(shape).expand(*values.shape[:-1], -1)
    return values.gather(-1, index).masked_fill((kept < 0).view(shape), torch.nan)
