"""Edits of attention and of values, applied as edits of the heads' outputs z.

z is the sum over keys of attention times value. So changed attention a' and changed values
v' give z + sum (a' - a) v + sum a' (v' - v). Only the difference is added to the model's own
z, so an edit without effect leaves z exactly as it is. Attention is recomputed from queries
and keys, whatever kernel the model runs.

Shapes: B prompts of T positions, of which the last n are queries; h edited heads of a layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Int

from ..errors import InputError
from ..walk.batch import Batch, make_batch
from ..walk.everywhere import Everywhere
from ..walk.recorder import BatchEdit, Donors, Recorder
from ..walk.scores import attention, content_scores, scores
from ..walk.views import LayerView
from .alignment import donor_columns, donors_of_sequences
from .edits import DropPosition, Patch, ScaleAttention

if TYPE_CHECKING:
    from ..head import Head
    from ..models import Model
    from ..prompts import Prompts

AttentionEdit = ScaleAttention | DropPosition | Patch


@dataclass
class Prepared:
    """An edit of attention or values, checked against model and prompts.

    Attributes
    ----------
    edit
        The edit.
    heads
        Heads to edit.
    queries, keys
        (prompt, position) boolean: query and key positions.
    labels_at
        (prompt, position) boolean: label positions.
    columns
        (prompt, position) matching columns of the donors (see `donor_columns`); None if the
        edit has no donors.
    """

    edit: AttentionEdit
    heads: list[Head]
    queries: Bool[np.ndarray, "prompt position"]
    keys: Bool[np.ndarray, "prompt position"]
    labels_at: Bool[np.ndarray, "prompt position"]
    columns: Int[np.ndarray, "prompt position"] | None = None

    @classmethod
    def of(
        cls,
        edit: AttentionEdit,
        heads: list[Head],
        queries: Bool[np.ndarray, "prompt position"],
        keys: Bool[np.ndarray, "prompt position"],
        model: Model,
        prompts: Prompts,
    ) -> Prepared:
        """Return an edit after checking it and aligning its donors.

        Raises
        ------
        InputError
            If donors do not align, if no attention is left to renormalize, or if a distance is
            given for a model without rotary embedding.
        """
        columns = None
        if isinstance(edit, Patch):
            edit = replace(edit, donor=donors_of_sequences(model, prompts, edit.donor))
            columns = donor_columns(prompts, prompts.token_id >= 0, edit.donor)
        elif isinstance(edit, DropPosition):
            if edit.distance != "zero" and not model.architecture.rotary:
                raise InputError(
                    f"distance={edit.distance!r} is only for rotary models, which {model.name} "
                    "is not: leave distance out"
                )
        elif edit.renormalize and edit.factor == 0:
            left = np.logical_or.accumulate(~keys & (prompts.token_id >= 0), axis=1)
            if (queries & ~left).any():
                row = int(np.flatnonzero((queries & ~left).any(axis=1))[0])
                raise InputError(
                    f"prompt {row}: a position sees nothing but the keys whose attention is cut; "
                    "renormalize=True needs other visible keys"
                )
        return cls(edit, heads, queries, keys, prompts.where("labels"), columns)

    def for_batch(self, model: Model, batch: Batch) -> Part:
        """Return the edit's part for a batch, with its donors' batch to run first."""
        by_layer: dict[int, list[int]] = {}
        for layer, head in self.heads:
            by_layer.setdefault(layer, []).append(head)
        first = batch.part(self.queries).any(axis=0)
        part = Part(
            self.edit,
            by_layer,
            batch.cut(self.queries),
            batch.cut(self.keys),
            batch.cut(self.labels_at),
            batch.width - int(first.argmax()) if first.any() else 0,
        )
        if self.columns is not None and part.n_queries:
            assert isinstance(self.edit, Patch)
            donors = make_batch(model, self.edit.donor, batch.rows)
            columns = batch.cut(self.columns).map(lambda x: (x + donors.width).clamp(min=0))
            recorder = _Donated(self.edit.what, by_layer, columns, part.n_queries)
            part.donated = recorder.found
            part.donors.append(Donors(donors, recorder))
        return part


@dataclass
class Part:
    """Part of an edit that concerns one batch.

    Attributes
    ----------
    heads
        Head numbers by layer.
    queries, keys, labels_at
        (B, T) boolean.
    n_queries
        Number of last positions that contain all query positions.
    donated
        Attention (B, heads, n_queries, T) or values (B, T, K, D) by layer, filled when the
        donors have run.
    donors
        Donors to run first, if any.
    """

    edit: AttentionEdit
    heads: dict[int, list[int]]
    queries: Everywhere
    keys: Everywhere
    labels_at: Everywhere
    n_queries: int
    donated: dict[int, torch.Tensor] = field(default_factory=dict)
    donors: list[Donors] = field(default_factory=list)

    def looks(
        self, layer: int, heads: list[int], n: int, device: torch.device
    ) -> Bool[torch.Tensor, "B h {n} 1"]:
        """Return (B, h, n, 1) boolean: query positions at which each head is edited."""
        mine = self.queries.on(device)[:, -n:]
        none = torch.zeros_like(mine)
        by_head = [mine if head in self.heads[layer] else none for head in heads]
        return torch.stack(by_head, dim=1).unsqueeze(-1)


class AttentionEdits(BatchEdit):
    """All edits of attention and values of a batch."""

    def __init__(self, parts: Sequence[Part]) -> None:
        self.parts = [part for part in parts if part.n_queries]
        self.donors = [donors for part in self.parts for donors in part.donors]

    def apply(
        self, view: LayerView, z: Float[torch.Tensor, "B T H D"]
    ) -> Float[torch.Tensor, "B T H D"]:
        parts = [part for part in self.parts if view.index in part.heads]
        if not parts:
            return z
        heads = sorted({head for part in parts for head in part.heads[view.index]})
        n = max(part.n_queries for part in parts)
        per = z.shape[2] // view.value.shape[2]
        owners = [head // per for head in heads]
        hidden = view.hidden(n)[:, None]
        plain = scores(view, n, heads)
        weights = attention(view, plain, heads)
        changed = _changed_attention(view, parts, heads, n, plain, weights, hidden)
        value = _heads_of(view.value, owners)
        added = (changed - weights) @ value
        for part in parts:
            if isinstance(part.edit, Patch) and part.edit.what == "values":
                new = _heads_of(part.donated[view.index].to(value.device), owners)
                moved = changed @ (new - value)
                added = added + moved.masked_fill(~part.looks(view.index, heads, n, z.device), 0)
        if view.gate is not None:
            gate = torch.stack([view.gate[:, -n:, head] for head in heads], dim=1)
            added = added * gate
        out = z.clone()
        for number, head in enumerate(heads):
            out[:, -n:, head] += added[:, number].to(z.dtype)
        return out


def _changed_attention(
    view: LayerView,
    parts: Sequence[Part],
    heads: list[int],
    n: int,
    plain: Float32[torch.Tensor, "B h n T"],
    weights: Float32[torch.Tensor, "B h n T"],
    hidden: Bool[torch.Tensor, "B 1 n T"],
) -> Float32[torch.Tensor, "B h n T"]:
    """Return (B, h, n, T) edited attention: first scores, then donors, then factors."""
    layer, device = view.index, plain.device

    def chosen(part: Part) -> Bool[torch.Tensor, "B h n T"]:
        return part.looks(layer, heads, n, device) & part.keys.on(device)[:, None, None]

    dropped = [(part, part.edit) for part in parts if isinstance(part.edit, DropPosition)]
    for part, edit in dropped:
        labels_at = part.labels_at.on(device) if edit.distance == "mean" else None
        plain = torch.where(chosen(part), content_scores(view, n, heads, labels_at), plain)
    changed = weights
    if dropped:
        changed = attention(view, plain, heads)
    again = torch.zeros_like(hidden)
    for part in parts:
        if isinstance(part.edit, Patch) and part.edit.what == "attention":
            donated = torch.zeros_like(changed)
            for number, head in enumerate(part.heads[layer]):
                own = part.donated[layer][:, number].to(device)
                donated[:, heads.index(head), n - own.shape[1] :] = own
            donated = donated.masked_fill(hidden, 0)
            changed = torch.where(part.looks(layer, heads, n, device), donated, changed)
    for part in parts:
        if isinstance(part.edit, ScaleAttention):
            changed = torch.where(chosen(part), changed * part.edit.factor, changed)
            if part.edit.renormalize:
                again = again | part.looks(layer, heads, n, device)
    least = torch.finfo(changed.dtype).tiny
    total = changed.sum(dim=-1, keepdim=True).clamp(min=least)
    return torch.where(again, changed / total, changed)


def _heads_of(
    value: Float[torch.Tensor, "B T K D"], owners: Sequence[int]
) -> Float32[torch.Tensor, "B h T D"]:
    """Return (B, h, T, D) float32 values of heads, given their key-value heads."""
    return torch.stack([value[:, :, owner] for owner in owners], dim=1).float()


class _Donated(Recorder):
    """Records donors' attention or values, at the positions that match those of the prompts."""

    def __init__(self, what: str, heads: dict[int, list[int]], columns: Everywhere, n: int) -> None:
        self.what, self.heads, self.columns, self.n = what, heads, columns, n
        self.found: dict[int, torch.Tensor] = {}

    def layer(self, view: LayerView) -> None:
        heads = self.heads.get(view.index)
        if heads is None:
            return
        columns, width = self.columns.on(view.z.device), view.z.shape[1]
        if self.what == "values":
            index = columns[:, :, None, None].expand(-1, -1, *view.value.shape[2:])
            self.found[view.index] = view.value.gather(1, index)
            return
        weights = attention(view, scores(view, width, heads), heads)
        rows = columns[:, None, -self.n :, None].expand(-1, len(heads), -1, width)
        weights = weights.gather(2, rows)
        keys = columns[:, None, None].expand(*weights.shape[:3], -1)
        self.found[view.index] = weights.gather(3, keys)
