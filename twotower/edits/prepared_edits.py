"""Preparation of edits: check them against model and prompts, then cut them to each batch."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Bool, Float

from ..errors import InputError, TwoTowerWarning
from ..head import check_heads
from ..prompts.positions import position_mask
from ..walk.batch import Batch
from ..walk.everywhere import Everywhere
from ..walk.not_finite import outside
from ..walk.recorder import BatchEdit
from ..walk.views import LayerView
from .attention import AttentionEdit, AttentionEdits, Prepared
from .cut import PreparedCut
from .edits import Add, CutEdges, Edit, KnockOut, Patch, as_edits
from .prepared import BatchChange, PreparedChange, prepare_change

if TYPE_CHECKING:
    from ..head import Head
    from ..models import Model
    from ..prompts import Prompts


class PreparedEdits:
    """Edits prepared for a model and prompts.

    On one head, attention is edited first, then values, then the output z, in whatever order
    the edits are given.

    Raises
    ------
    InputError
        If heads are out of range, positions have another shape, or two edits change the
        attention, values or output of one head at the same position.
    """

    def __init__(self, model: Model, prompts: Prompts, edits: Sequence[Edit]) -> None:
        self.model = model
        self.outputs: list[_PreparedOutput] = []
        self.attention: list[Prepared] = []
        self.added: list[_PreparedVector] = []
        self.cuts: list[PreparedCut] = []
        self.taken: dict[tuple[str, Head], list[tuple[np.ndarray, np.ndarray]]] = {}
        for edit in as_edits(edits):
            if isinstance(edit, CutEdges):
                self._cut(edit, prompts)
                continue
            heads = check_heads(edit.heads, model)
            at = position_mask(prompts, edit.positions)
            if isinstance(edit, Add):
                self.added.append(_PreparedVector.of(edit, at, model))
                continue
            keys = position_mask(prompts, getattr(edit, "keys", "all"))
            target = _target(edit)
            self._claim(target, heads, at, keys)
            if isinstance(edit, KnockOut):
                change = prepare_change(edit.to, model, prompts, at)
                self.outputs.append(_PreparedOutput(_by_layer(heads), at, change))
            else:
                self.attention.append(Prepared.of(edit, heads, at, keys, model, prompts))

    def _cut(self, edit: CutEdges, prompts: Prompts) -> None:
        cut = PreparedCut(self.model, prompts, edit)
        everywhere = np.ones_like(cut.outputs)
        for part, heads in (("attention", cut.of("qk")), ("values", cut.of("v"))):
            self._claim(part, heads, cut.outputs, everywhere)
        self.cuts.append(cut)

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
        """Return the edits of a batch, for a walk to apply."""
        parts = [prepared.for_batch(self.model, batch) for prepared in self.attention]
        ready: list[BatchEdit] = [cut.for_batch(batch) for cut in self.cuts]
        ready += [AttentionEdits(parts)] if parts else []
        ready += [vector.for_batch(batch) for vector in self.added]
        return ready + [output.for_batch(batch) for output in self.outputs]

    @property
    def any(self) -> bool:
        """Whether there are edits."""
        return bool(self.outputs or self.attention or self.added or self.cuts)


def _target(edit: KnockOut | AttentionEdit) -> str:
    """Return the part of a head that an edit changes: "output", "attention" or "values"."""
    if isinstance(edit, KnockOut):
        return "output"
    return edit.what if isinstance(edit, Patch) else "attention"


@dataclass
class _PreparedVector:
    """Vector to add to the residual stream, prepared for a model and prompts."""

    layer: int
    vector: Float[np.ndarray, " d_model"]
    at: Bool[np.ndarray, "prompt position"]

    @classmethod
    def of(
        cls, edit: Add, at: Bool[np.ndarray, "prompt position"], model: Model
    ) -> _PreparedVector:
        """Return a vector after checking its layer and length."""
        if edit.layer >= model.n_layers:
            raise InputError(f"layer={edit.layer} is not below the model's {model.n_layers} layers")
        if len(edit.vector) != model.d_model:
            raise InputError(
                f"the vector has {len(edit.vector)} numbers and the model's residual stream "
                f"{model.d_model}"
            )
        made_on = edit.made_on.get("weights_hash")
        if made_on and model.weights_hash not in ("", made_on):  # offloaded weights have no hash
            warnings.warn(
                f"the vector to add was made on other weights, of {edit.made_on.get('model')!r}; "
                "make it on this model if you did not mean that",
                TwoTowerWarning,
                stacklevel=outside(),
            )
        return cls(edit.layer, edit.vector, at)

    def for_batch(self, batch: Batch) -> AddVector:
        vector = batch.everywhere(self.vector)
        return AddVector(self.layer, vector, batch.cut(self.at))


class AddVector(BatchEdit):
    """Edit that adds a vector to the residual stream entering a layer."""

    def __init__(self, layer: int, vector: Everywhere, positions: Everywhere) -> None:
        self.index, self.vector, self.positions = layer, vector, positions

    def enter(
        self, layer: int, residual: Float[torch.Tensor, "B S d_model"], last: bool = False
    ) -> Float[torch.Tensor, "B S d_model"]:
        if layer != self.index:
            return residual
        mask = self.positions.on(residual.device)
        mask = mask[:, -1:] if last else mask
        return residual + self.vector.on(residual.device).to(residual.dtype) * mask.unsqueeze(-1)


@dataclass
class _PreparedOutput:
    """Change of heads' outputs, prepared for a model and prompts."""

    heads: dict[int, list[int]]
    at: Bool[np.ndarray, "prompt position"]
    change: PreparedChange

    def for_batch(self, batch: Batch) -> BatchEdit:
        change = self.change.for_batch(batch, sorted(self.heads))
        return ChangeHeads(self.heads, batch.cut(self.at), change)


def _by_layer(heads: Sequence[Head]) -> dict[int, list[int]]:
    """Return head numbers by layer."""
    found: dict[int, list[int]] = {}
    for layer, head in heads:
        found.setdefault(layer, []).append(head)
    return found


class ChangeHeads(BatchEdit):
    """Edit that changes heads' outputs in a walk."""

    def __init__(
        self, heads: dict[int, list[int]], positions: Everywhere, change: BatchChange
    ) -> None:
        self.heads, self.positions, self.change = heads, positions, change
        self.donors = change.donors

    def apply(
        self, view: LayerView, z: Float[torch.Tensor, "B T H D"]
    ) -> Float[torch.Tensor, "B T H D"]:
        return self.changed(view.index, z)

    def changed(
        self, layer: int, z: Float[torch.Tensor, "B S H D"], last: bool = False
    ) -> Float[torch.Tensor, "B S H D"]:
        """Return the edited z of a layer.

        Parameters
        ----------
        layer
            Number of the layer.
        z
            (B, T, H, D), or (B, 1, H, D) of a position that is treated like the last.
        last
            Whether it is the latter.
        """
        if layer not in self.heads:
            return z
        positions = self.positions.on(z.device)
        new = self.change.output(layer, z)
        if last:
            positions = positions[:, -1:]
            new = new[:, -1:] if self.change.replacements is not None else new
        return torch.where(_chosen(self.heads[layer], positions, z), new, z)


def _chosen(
    heads: list[int], mask: Bool[torch.Tensor, "B T"], z: Float[torch.Tensor, "B T H D"]
) -> Bool[torch.Tensor, "B T H 1"]:
    """Return (B, T, H, 1) boolean: the positions, for the given heads.

    Uses only tensors on the device; indexing with a list would need a copy from the CPU.
    """
    none = torch.zeros_like(mask)
    by_head = [mask if head in heads else none for head in range(z.shape[2])]
    return torch.stack(by_head, dim=-1).unsqueeze(-1)
