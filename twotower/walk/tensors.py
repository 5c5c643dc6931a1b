"""Tensor operations that recorders share."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int

from .batch import Batch
from .walk import End


def margin(
    logits: Float[torch.Tensor, "B *rest label"], gold: Int[torch.Tensor, " B"]
) -> Float[torch.Tensor, " B *rest"]:
    """Return the right label's logit minus the largest other one: (B, ..., label) to (B, ...)."""
    is_gold = torch.arange(logits.shape[-1], device=logits.device) == gold[:, None]
    is_gold = is_gold.view(len(gold), *[1] * (logits.dim() - 2), -1)
    right = logits.masked_fill(~is_gold, -torch.inf).amax(dim=-1)
    return right - logits.masked_fill(is_gold, -torch.inf).amax(dim=-1)


def stack(
    by_layer: list[Float[torch.Tensor, " B *rest"]], end: End
) -> Float[torch.Tensor, "B layer *rest"]:
    """Return the layers' tensors (B, ...), which may be on several devices, as (B, layer, ...)."""
    return torch.stack([x.to(end.residual.device) for x in by_layer], dim=1)


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
