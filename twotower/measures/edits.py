"""Edits made ready: checked against model and prompts, then cut to each batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Bool, Float

from ..checks import whole
from ..errors import InputError
from ..intervention import (
    DropPosition,
    Edit,
    KnockOut,
    Patch,
    Scale,
    ScaleAttention,
    as_edits,
    check_change,
    check_heads,
)
from .ablation import Replacement, Values, make_replacement
from .attention_edits import AttentionEdits, Prepared
from .batch import Batch
from .everywhere import Everywhere
from .walk import BatchEdit, LayerView

if TYPE_CHECKING:
    from ..head import Head
    from ..intervention import Positions
    from ..models import Model
    from ..prompts import Prompts


class PreparedEdits:
    """Edits that fit a model and prompts.

    On one head attention is edited first, then values, then the output z, whatever the
    order in which the edits are given.

    Raises
    ------
    InputError
        If an edit names heads out of range or positions of another shape, or if the same
        thing of one head is edited twice at the same position.
    """

    def __init__(self, model: Model, prompts: Prompts, edits: Sequence[Edit]) -> None:
        self.model = model
        self.outputs: list[_PreparedOutput] = []
        self.attention: list[Prepared] = []
        self.taken: dict[tuple[str, Head], list[tuple[np.ndarray, np.ndarray]]] = {}
        for edit in as_edits(edits):
            heads = check_heads(edit.heads, model)
            at = position_mask(prompts, edit.positions)
            keys = position_mask(prompts, getattr(edit, "keys", "all"))
            target = _target(edit)
            self._claim(target, heads, at, keys)
            if target == "output":
                self.outputs.append(_PreparedOutput.of(edit, heads, at, model, prompts))
            else:
                prepared = Prepared.of(edit, heads, at, keys, model, prompts)  # type: ignore[arg-type]
                self.attention.append(prepared)

    def _claim(
        self,
        target: str,
        heads: Sequence[Head],
        at: Bool[np.ndarray, "prompt position"],
        keys: Bool[np.ndarray, "prompt position"],
    ) -> None:
        for head in heads:
            claimed = self.taken.setdefault((target, head), [])
            for other_at, other_keys in claimed:
                twice = (at & other_at).any(axis=1)
                if target == "attention":
                    twice &= (keys & other_keys).any(axis=1)
                if twice.any():
                    raise InputError(
                        f"the {target} of head {head} is edited twice at one position; "
                        "leave it out of one edit"
                    )
            claimed.append((at, keys))

    def for_batch(self, batch: Batch) -> list[BatchEdit]:
        """The edits of a batch, as a walk applies them."""
        parts = [prepared.for_batch(self.model, batch) for prepared in self.attention]
        ready: list[BatchEdit] = [AttentionEdits(parts)] if parts else []
        return ready + [output.for_batch(batch) for output in self.outputs]


def _target(edit: Edit) -> str:
    """What of a head an edit changes."""
    if isinstance(edit, Patch):
        return {"z": "output"}.get(edit.what, edit.what)
    return "attention" if isinstance(edit, (ScaleAttention, DropPosition)) else "output"


@dataclass
class _PreparedOutput:
    """An edit of heads' outputs, checked: what z is multiplied or replaced by, and where."""

    heads: dict[int, list[int]]
    at: Bool[np.ndarray, "prompt position"]
    factor: float
    replacement: Replacement | None

    @classmethod
    def of(
        cls, edit: Edit, heads: Sequence[Head], at: np.ndarray, model: Model, prompts: Prompts
    ) -> _PreparedOutput:
        by_layer: dict[int, list[int]] = {}
        for layer, head in heads:
            by_layer.setdefault(layer, []).append(head)
        if isinstance(edit, Scale):
            return cls(by_layer, at, edit.factor, None)
        how: tuple[str, Prompts | None, int]
        if isinstance(edit, KnockOut):
            how = (edit.ablation, edit.reference, edit.seed)
        else:
            assert isinstance(edit, Patch)
            how = ("patch", edit.donor, 0)
        return cls(by_layer, at, 0.0, make_replacement(model, prompts, at, *how))

    def for_batch(self, batch: Batch) -> BatchEdit:
        mask = batch.cut(self.at)
        if self.replacement is None:
            return _ScaleHeads(self.heads, mask, self.factor)
        values = self.replacement.values(batch, sorted(self.heads))
        return _ReplaceHeads(self.heads, mask, values)


def position_mask(prompts: Prompts, positions: Positions) -> Bool[np.ndarray, "prompt position"]:
    """(prompt, position) boolean, from a name, from `twotower.at`, or from a user's array.

    Raises
    ------
    InputError
        If the name is not known, or the array is not boolean of that shape.
    """
    if isinstance(positions, str):
        return prompts.where(positions)
    if hasattr(positions, "mask") and hasattr(positions, "describe"):
        return positions.mask(prompts)
    mask = np.asarray(positions)
    if mask.dtype != bool or mask.shape != prompts.token_id.shape:
        raise InputError(
            f"positions must be 'last', 'labels', 'all', at(...) or a boolean array of shape "
            f"{prompts.token_id.shape}; this is {mask.dtype} of shape {mask.shape}"
        )
    return mask & (prompts.token_id >= 0)


def prepare_change(
    model: Model,
    prompts: Prompts,
    positions: Positions,
    ablation: str,
    reference: Prompts | None,
    seed: int,
    factor: float,
) -> tuple[Bool[np.ndarray, "prompt position"], Replacement]:
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
    def __init__(self, heads: dict[int, list[int]], mask: Everywhere, factor: float) -> None:
        self.heads, self.mask, self.factor = heads, mask, factor

    def apply(
        self, view: LayerView, z: Float[torch.Tensor, "B T H D"]
    ) -> Float[torch.Tensor, "B T H D"]:
        if view.index not in self.heads:
            return z
        return torch.where(_chosen(self.heads[view.index], self.mask, z), z * self.factor, z)


class _ReplaceHeads(BatchEdit):
    def __init__(
        self,
        heads: dict[int, list[int]],
        mask: Everywhere,
        values: Values | None,
    ) -> None:
        self.heads, self.mask, self.values = heads, mask, values
        self.donors = () if values is None else values.donors

    def apply(
        self, view: LayerView, z: Float[torch.Tensor, "B T H D"]
    ) -> Float[torch.Tensor, "B T H D"]:
        if view.index not in self.heads:
            return z
        new = torch.zeros((), dtype=z.dtype, device=z.device)
        if self.values is not None:
            new = self.values.by_layer[view.index].to(z.device, z.dtype)
        return torch.where(_chosen(self.heads[view.index], self.mask, z), new, z)


def _chosen(
    heads: list[int], positions: Everywhere, z: Float[torch.Tensor, "B T H D"]
) -> Bool[torch.Tensor, "B T H 1"]:
    """(B, T, H, 1) boolean: the positions, in the heads named.

    Made of tensors that are on the device; an index from a list would have to come there.
    """
    mask = positions.on(z.device)
    none = torch.zeros_like(mask)
    by_head = [mask if head in heads else none for head in range(z.shape[2])]
    return torch.stack(by_head, dim=-1).unsqueeze(-1)
