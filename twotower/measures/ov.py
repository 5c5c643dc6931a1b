"""OV: label logits of every position's value-output vector."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ..head import Head, as_list, check_heads
from ..models.architecture import call
from ..walk.batch import Batch
from ..walk.readout import Readout
from ..walk.readouts import Readouts
from ..walk.recorder import Recorder, Together
from ..walk.tensors import keep, stack_heads
from ..walk.views import End, LayerView
from .collect import run
from .measure import MakeRecorder, Measure

if TYPE_CHECKING:
    import xarray as xr

    from ..models import Model
    from ..prompts import Prompts
    from ..prompts.positions import Positions


def ov_labels(
    model: Model,
    prompts: Prompts,
    *,
    top_tokens: Sequence[tuple[int, int]] = (),
    keep: Positions = "all",
) -> xr.Dataset:
    """Return the label logits of every head's value-output vector at every position.

    Parameters
    ----------
    model, prompts
        Model and prompts to measure.
    top_tokens
        Heads whose vectors are unembedded to the whole vocabulary, to find the most likely
        token at each position.
    keep
        Positions to keep, as in `qk_similarity`.

    Returns
    -------
    xarray.Dataset
        label_logit (prompt, layer, head, position, label) of the raw vectors; multiply it by
        attention for the weighted vectors. top_token (prompt, chosen, position), where
        `chosen` names heads as "layer.head". NaN or "" at padding.

    Raises
    ------
    InputError
        If a head is out of range, or `keep` selects no position.
    """
    return run(model, prompts, LabelValues(tuple(as_list(top_tokens)), keep))


@dataclass(frozen=True, eq=False)
class LabelValues(Measure):
    """The measure behind `ov_labels`, with its settings."""

    group = "ov"

    top_tokens: tuple[tuple[int, int], ...] = ()
    keep: Positions = "all"

    def prepare(self, model: Model, prompts: Prompts) -> MakeRecorder:
        heads = check_heads(self.top_tokens, model)
        readouts = Readouts(model, prompts)

        def make(batch: Batch) -> Recorder:
            labels = LabelValuesRecorder(batch, readouts.of(batch))
            if not heads:
                return labels
            return Together([labels, TopTokens(batch, labels.readout, heads)])

        return make

    def settings(self) -> dict[str, Any]:
        found = super().settings()
        return found if self.top_tokens else {"keep": found["keep"]}

    def coordinates(self) -> Mapping[str, Any]:
        return {"chosen": [str(Head(*head)) for head in self.top_tokens]} if self.top_tokens else {}


class LabelValuesRecorder(Recorder):
    """Records the label logits of every head's raw value-output vectors."""

    group = "ov"

    def __init__(self, batch: Batch, readout: Readout) -> None:
        self.batch, self.readout = batch, readout
        self.found: list[torch.Tensor] = []

    def layer(self, view: LayerView) -> None:
        directions = self.readout.on(view.value.device).directions[view.index]
        assert directions is not None
        if view.gate is not None:
            directions = directions * view.gate[:, -1, :, :, None].float()  # (B, H, D, label)
        grouped = directions.unflatten(-3, (view.value.shape[2], -1))
        # (B, K, T, D) @ (K, D, G label): every head reads its own key-value head.
        per, n_labels = grouped.shape[-3], grouped.shape[-1]
        flat = grouped.transpose(-3, -2).flatten(-2)
        logits = (view.value.float().transpose(1, 2) @ flat).unflatten(-1, (per, n_labels))
        logits = logits.permute(0, 1, 3, 2, 4).flatten(1, 2)
        spread = self.readout.write_spread(view)
        if spread is not None:
            logits = logits / spread.view(-1, 1, 1, 1)
        hidden = ~view.real[:, None, :, None]
        masked = logits.masked_fill(hidden, torch.nan)
        self.found.append(keep(masked.transpose(-1, -2), self.batch).transpose(-1, -2))

    def finish(self, end: End) -> dict[str, torch.Tensor]:
        spread = self.readout.spread(end.residual)
        return {"label_logit": stack_heads(self.found, end) / spread.view(-1, 1, 1, 1, 1)}


TOP_AT_ONCE = 64
"""Vectors to unembed at a time, to bound the memory of the logits."""


class TopTokens(Recorder):
    """Records the token with the largest logit of each chosen head's raw value-output vector."""

    group = "ov"

    def __init__(self, batch: Batch, readout: Readout, heads: Sequence[tuple[int, int]]) -> None:
        self.batch, self.readout, self.heads = batch, readout, heads
        self.vectors: dict[tuple[int, int], torch.Tensor] = {}

    def layer(self, view: LayerView) -> None:
        n_heads, per = view.z.shape[2], view.z.shape[2] // view.value.shape[2]
        for layer, head in self.heads:
            if layer != view.index:
                continue
            value = keep(view.value[:, :, head // per].transpose(1, 2), self.batch)
            alone = value.new_zeros(*value.mT.shape[:2], n_heads, value.shape[1])
            alone[:, :, head] = value.mT.nan_to_num()
            if view.gate is not None:
                alone = alone * view.gate[:, -1:]
            projection = view.architecture.projection(view.block)
            nothing = call(projection, torch.zeros_like(alone[:1, :1]).flatten(-2))
            output = call(projection, alone.flatten(-2)) - nothing
            self.vectors[layer, head] = self.readout.write(view, output)

    def finish(self, end: End) -> dict[str, torch.Tensor]:
        spread = self.readout.spread(end.residual)
        zero = torch.zeros_like(end.residual[:1, None], dtype=end.dtype)
        bias = end.unembedding(zero)
        tops = []
        for head in self.heads:
            vector = self.vectors[head].to(end.residual.device)
            shift = self.readout.on(vector.device).norm.shift
            normed = self.readout.frozen_norm(vector, spread[:, None]) - shift
            rows = [
                (end.unembedding(x[:, None].to(zero.dtype)) - bias).argmax(dim=-1)
                for x in normed.flatten(0, 1).split(TOP_AT_ONCE)
            ]
            tops.append(torch.cat(rows).unflatten(0, normed.shape[:2])[..., 0])
        found = torch.stack(tops, dim=1)
        padded = ~self.batch.mask.on(found.device)
        if self.batch.kept is not None:
            padded = self.batch.kept.on(found.device) < 0
        return {"top_token": found.masked_fill(padded[:, None], -1)}
