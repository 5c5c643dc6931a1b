"""Edits made ready: checked against model and prompts, then cut to each batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from ..checks import whole
from ..errors import InputError
from ..intervention import Edit, KnockOut, Scale, as_edits, check_change, check_heads
from .ablation import Replacement, make_replacement
from .batch import Batch
from .walk import BatchEdit, LayerView

if TYPE_CHECKING:
    from ..models import Head, Model
    from ..prompts import Prompts


class PreparedEdits:
    """Edits that fit a model and prompts.

    Raises
    ------
    InputError
        If an edit names heads out of range or positions of another shape, or if one
        head's output is edited twice at the same position.
    """

    def __init__(self, model: Model, prompts: Prompts, edits: Sequence[Edit]) -> None:
        self.model = model
        self.parts = []
        taken: dict[Head, np.ndarray] = {}
        for edit in as_edits(edits):
            heads = check_heads(edit.heads, model)
            at = position_mask(prompts, edit.positions)
            for head in heads:
                if head in taken and (taken[head] & at).any():
                    raise InputError(
                        f"the output of head {head} is edited twice at one position; "
                        "leave it out of one edit"
                    )
                taken[head] = taken.get(head, False) | at
            replacement = None
            if isinstance(edit, KnockOut):
                replacement = make_replacement(
                    model, prompts, at, edit.ablation, edit.reference, edit.seed
                )
            self.parts.append((edit, heads, at, replacement))

    def for_batch(self, batch: Batch) -> list[BatchEdit]:
        """The edits of a batch, as a walk applies them."""
        ready: list[BatchEdit] = []
        for edit, heads, at, replacement in self.parts:
            mask = batch.cut(at)
            by_layer: dict[int, list[int]] = {}
            for layer, head in heads:
                by_layer.setdefault(layer, []).append(head)
            if isinstance(edit, Scale):
                ready.append(_ScaleHeads(by_layer, mask, edit.factor))
            elif replacement is not None:
                every = torch.arange(mask.numel(), device=mask.device).view(mask.shape)
                values = replacement.values(batch, sorted(by_layer), every)
                ready.append(_ReplaceHeads(by_layer, mask, values))
        return ready


def position_mask(prompts: Prompts, positions: str | np.ndarray) -> np.ndarray:
    """(prompt, position) boolean, from a name or from a user's array.

    Raises
    ------
    InputError
        If the name is not known, or the array is not boolean of that shape.
    """
    if isinstance(positions, str):
        return prompts.where(positions)
    mask = np.asarray(positions)
    if mask.dtype != bool or mask.shape != prompts.token_id.shape:
        raise InputError(
            f"positions must be 'last', 'labels', 'all' or a boolean array of shape "
            f"{prompts.token_id.shape}; this is {mask.dtype} of shape {mask.shape}"
        )
    return mask & (prompts.token_id >= 0)


def prepare_change(
    model: Model,
    prompts: Prompts,
    positions: str | np.ndarray,
    ablation: str,
    reference: Prompts | None,
    seed: int,
    factor: float,
) -> tuple[np.ndarray, Replacement]:
    """Where heads are changed, (prompt, position) boolean, and what by.

    Raises
    ------
    InputError
        If no position is meant, or change and reference do not fit.
    """
    check_change(ablation, reference, factor)
    whole("seed", seed)
    at = position_mask(prompts, positions)
    if not at.any():
        raise InputError("positions are empty: nothing would be changed")
    return at, make_replacement(model, prompts, at, ablation, reference, seed)


class _ScaleHeads(BatchEdit):
    def __init__(self, heads: dict[int, list[int]], mask: torch.Tensor, factor: float) -> None:
        self.heads, self.mask, self.factor = heads, mask, factor

    def apply(self, view: LayerView, z: torch.Tensor) -> torch.Tensor:
        if view.index not in self.heads:
            return z
        return torch.where(_chosen(self.heads[view.index], self.mask, z), z * self.factor, z)


class _ReplaceHeads(BatchEdit):
    def __init__(
        self,
        heads: dict[int, list[int]],
        mask: torch.Tensor,
        values: dict[int, torch.Tensor] | None,
    ) -> None:
        self.heads, self.mask, self.values = heads, mask, values

    def apply(self, view: LayerView, z: torch.Tensor) -> torch.Tensor:
        if view.index not in self.heads:
            return z
        new = torch.zeros((), dtype=z.dtype, device=z.device)
        if self.values is not None:
            new = self.values[view.index].to(z.device, z.dtype)
        return torch.where(_chosen(self.heads[view.index], self.mask, z), new, z)


def _chosen(heads: list[int], mask: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    """(B, T, H, 1) boolean: positions of the mask, in the heads named."""
    of_head = torch.zeros(z.shape[2], dtype=torch.bool, device=z.device)
    of_head[heads] = True
    return mask.to(z.device)[:, :, None, None] & of_head[:, None]
