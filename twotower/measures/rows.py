"""Counterfactual rows: what the end of a prompt would be, had a head been changed.

A change at position s and later leaves everything before s as it was. So a counterfactual
is kept as a *row*: the residual stream of the last S = T - s positions. A row joins at the
layer of its head and goes through the blocks above; its queries attend to the clean keys
and values of the earlier positions and to the row's own. With S = 1 (the last position)
one walk sweeps all heads for about the cost of one more forward; with S = T a row is a
whole sequence. Each row is exact: it equals a separate forward with the head changed.

Shapes: B prompts, n rows of each, S positions, H heads on K key-value heads, D = d_head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from ..models.architecture import call
from .walk import LayerView


@dataclass
class Clean:
    """What rows need of a layer of the clean run; kept small, so that layers can wait.

    Attributes
    ----------
    residual, mlp_output
        (B, S, d_model); the latter only where the block is parallel.
    z
        (B, S, H, D).
    key, value
        (B, s, K, D) of the positions before the rows, keys after rotary.
    """

    view: LayerView
    residual: torch.Tensor
    z: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    mlp_output: torch.Tensor | None

    @classmethod
    def of(cls, view: LayerView, n_row: int) -> Clean:
        """The part of a view that rows of S = `n_row` positions need."""
        width = view.residual.shape[1]
        before = width - n_row
        parallel = view.architecture.parallel
        return cls(
            view,
            view.residual[:, before:],
            view.z[:, before:],
            view.rotated_key[:, :before],
            view.value[:, :before],
            view.mlp_output[:, before:] if parallel and view.mlp_output is not None else None,
        )


def new_rows(
    clean: Clean, heads: list[int], mask: torch.Tensor, replacement: torch.Tensor | None
) -> torch.Tensor:
    """Rows (B, n, S, d_model) leaving a layer in which one head each was changed.

    Parameters
    ----------
    clean
        The layer in the clean run.
    heads
        The n heads, one for each row.
    mask
        (B, S) boolean: positions at which z is replaced.
    replacement
        (B, S, H, D) what it is replaced by; None for zero.
    """
    z = clean.z
    if replacement is None:
        replacement = torch.zeros_like(z)
    swap = torch.zeros(len(heads), z.shape[2], dtype=torch.bool, device=z.device)
    swap[torch.arange(len(heads)), heads] = True
    swap_at = mask[:, None, :, None, None] & swap[None, :, None, :, None]
    changed = torch.where(swap_at, replacement.to(z.dtype)[:, None], z[:, None])
    architecture, block = clean.view.architecture, clean.view.block
    attention_output = call(architecture.projection(block), changed.flatten(-2))
    mlp_output = None if clean.mlp_output is None else clean.mlp_output[:, None]
    return _finish(clean, clean.residual[:, None], attention_output, mlp_output)


def advance(clean: Clean, rows: torch.Tensor, only_last: bool = False) -> torch.Tensor:
    """Rows (B, n, S, d_model) taken through a block.

    With `only_last` the answer holds the last position alone, (B, n, 1, d_model); the
    last block needs no more.
    """
    architecture, block = clean.view.architecture, clean.view.block
    normed = architecture.attention_norm(block)(rows)
    projected = [call(module, normed) for module in architecture.qkv(block)]
    query, key, value = architecture.split(block, projected)
    n_row = rows.shape[2]
    key = clean.view.rotate(key, slice(-n_row, None))
    n_query = 1 if only_last else n_row
    query = clean.view.rotate(query[:, :, -n_query:], slice(-n_query, None))
    z = _attend_one(clean, query, key, value) if n_row == 1 else _attend(clean, query, key, value)
    attention_output = call(architecture.projection(block), z.flatten(-2))
    return _finish(clean, rows[:, :, -n_query:], attention_output, None)


def _finish(
    clean: Clean,
    residual: torch.Tensor,
    attention_output: torch.Tensor,
    mlp_output: torch.Tensor | None,
) -> torch.Tensor:
    """What leaves the block, from what entered it and what its attention gave."""
    architecture, block = clean.view.architecture, clean.view.block
    middle = residual + attention_output
    if mlp_output is None:
        source = residual if architecture.parallel else middle
        mlp_output = call(architecture.mlp(block), architecture.mlp_norm(block)(source))
    return middle + mlp_output


def _attend_one(clean: Clean, query: Any, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """z (B, n, 1, H, D) of rows of one position: clean keys are shared, not copied."""
    view = clean.view
    n_kv, n_rows = key.shape[3], query.shape[1]
    scale = view.architecture.scaling(view.index)
    # (B, n, 1, H, D) to (B, K, n G, D), so that each key head's queries are one matrix.
    q = query[:, :, 0].unflatten(2, (n_kv, -1)).permute(0, 2, 1, 3, 4).flatten(2, 3)
    earlier = (q @ clean.key.permute(0, 2, 3, 1)).float() * scale
    seen = view.visible()[:, :, :-1].unsqueeze(1)
    earlier = earlier.masked_fill(~seen, -torch.inf)
    k, v = (x[:, :, 0].permute(0, 2, 1, 3).unsqueeze(3) for x in (key, value))
    own_query = q.unflatten(2, (n_rows, -1))
    own = ((own_query * k).sum(dim=-1).flatten(2).float() * scale).unsqueeze(-1)
    weights = torch.cat((earlier, own), dim=-1).softmax(dim=-1).to(value.dtype)
    z = weights[..., :-1] @ clean.value.permute(0, 2, 1, 3)
    z = z.unflatten(2, (n_rows, -1)) + weights[..., -1:].unflatten(2, (n_rows, -1)) * v
    return z.permute(0, 2, 1, 3, 4).flatten(2, 3).unsqueeze(2)


def _attend(clean: Clean, query: Any, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """z (B, n, Q, H, D) of rows of several positions."""
    view = clean.view
    batch, n_rows = query.shape[:2]

    def whole(earlier: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
        shared = earlier[:, None].expand(-1, n_rows, -1, -1, -1)
        return torch.cat((shared, own), dim=2).flatten(0, 1).transpose(1, 2)

    seen = view.visible(query.shape[2])[:, None].expand(-1, n_rows, -1, -1).flatten(0, 1)
    z = functional.scaled_dot_product_attention(
        query.flatten(0, 1).transpose(1, 2),
        whole(clean.key, key),
        whole(clean.value, value),
        attn_mask=seen[:, None],
        scale=view.architecture.scaling(view.index),
        enable_gqa=True,
    )
    return z.transpose(1, 2).unflatten(0, (batch, n_rows))
