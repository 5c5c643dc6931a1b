"""What each measure takes from a walk. Each class is one measure on one batch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float, Int

from ..models.architecture import call
from .batch import Batch
from .content import content_scores
from .everywhere import Everywhere
from .readout import Readout
from .walk import End, LayerView, Recorder


def margin(
    logits: Float[torch.Tensor, "B *rest label"], gold: Int[torch.Tensor, " B"]
) -> Float[torch.Tensor, " B *rest"]:
    """Right label's logit minus the largest other label's: (B, ..., label) to (B, ...)."""
    is_gold = torch.arange(logits.shape[-1], device=logits.device) == gold[:, None]
    is_gold = is_gold.view(len(gold), *[1] * (logits.dim() - 2), -1)
    right = logits.masked_fill(~is_gold, -torch.inf).amax(dim=-1)
    return right - logits.masked_fill(is_gold, -torch.inf).amax(dim=-1)


class Predictions(Recorder):
    """The model's answers at the last position."""

    group = "predictions"

    def __init__(self, batch: Batch, label_ids: tuple[int, ...]) -> None:
        self.gold = batch.gold
        self.label_ids = batch.everywhere(np.array(label_ids))

    def finish(self, end: End) -> dict[str, torch.Tensor]:
        logits = end.logits
        gold, ids = (x.on(logits.device) for x in (self.gold, self.label_ids))
        labels = logits[:, ids]
        top = logits.argmax(dim=-1)
        return {
            "logit": labels,
            "logprob": labels - logits.logsumexp(dim=-1, keepdim=True),
            "margin": margin(labels, gold),
            "correct": labels.argmax(dim=-1) == gold,
            "top_token": top,
            "top1_correct": top == ids[gold],
        }


class Similarity(Recorder):
    """QK scores of the last position, their content part, and attention."""

    group = "qk"

    def __init__(self, batch: Batch, labels_at: Everywhere) -> None:
        self.batch, self.labels_at = batch, labels_at
        self.found: dict[str, list[torch.Tensor]] = {}

    def layer(self, view: LayerView) -> None:
        hidden, labels_at = ~view.real[:, None], self.labels_at.on(view.z.device)
        parts = {"score": view.scores, "attention": view.attention}
        if view.learned is not None or view.cos is not None:
            parts["score_content"] = content_scores(view, 1)[:, :, 0]
        if view.cos is not None:
            parts["score_content_mean"] = content_scores(view, 1, labels_at=labels_at)[:, :, 0]
        for name, values in parts.items():
            kept = keep(values.masked_fill(hidden, torch.nan), self.batch)
            self.found.setdefault(name, []).append(kept)

    def finish(self, end: End) -> dict[str, torch.Tensor]:
        return {name: stack(values, end) for name, values in self.found.items()}


class LabelValues(Recorder):
    """Label logits of every head's raw value-output vectors."""

    group = "ov"

    def __init__(self, batch: Batch, readout: Readout) -> None:
        self.batch, self.readout = batch, readout
        self.found: list[torch.Tensor] = []

    def layer(self, view: LayerView) -> None:
        directions = self.readout.on(view.value.device).directions[view.index]
        grouped = directions.unflatten(0, (view.value.shape[2], -1))
        # (B, K, T, D) with (K, D, G label): every head reads its own key-value head.
        n_kv, per, d_head, n_labels = grouped.shape
        flat = grouped.permute(0, 2, 1, 3).reshape(n_kv, d_head, per * n_labels)
        logits = (view.value.float().transpose(1, 2) @ flat).unflatten(-1, (per, n_labels))
        logits = logits.permute(0, 1, 3, 2, 4).flatten(1, 2)
        hidden = ~view.real[:, None, :, None]
        masked = logits.masked_fill(hidden, torch.nan)
        self.found.append(keep(masked.transpose(-1, -2), self.batch).transpose(-1, -2))

    def finish(self, end: End) -> dict[str, torch.Tensor]:
        spread = self.readout.spread(end.residual)
        return {"label_logit": stack(self.found, end) / spread.view(-1, 1, 1, 1, 1)}


TOP_AT_ONCE = 64
"""Vectors that are unembedded together."""


class TopTokens(Recorder):
    """Vocabulary token with the largest logit of a head's raw value-output vector."""

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
            projection = view.architecture.projection(view.block)
            nothing = call(projection, torch.zeros_like(alone[:1, :1]).flatten(-2))
            self.vectors[layer, head] = call(projection, alone.flatten(-2)) - nothing

    def finish(self, end: End) -> dict[str, torch.Tensor]:
        spread = self.readout.spread(end.residual)
        zero = torch.zeros_like(end.residual[:1, None], dtype=end.dtype)
        bias = end.unembedding(zero)
        tops = []
        for head in self.heads:
            vector = self.vectors[head].to(end.residual.device)
            shift = self.readout.on(vector.device).shift
            normed = self.readout.frozen_norm(vector, spread[:, None]) - shift
            rows = [
                # Some at a time: vocabularies are wide.
                (end.unembedding(x[:, None].to(zero.dtype)) - bias).argmax(dim=-1)
                for x in normed.flatten(0, 1).split(TOP_AT_ONCE)
            ]
            tops.append(torch.cat(rows).unflatten(0, normed.shape[:2])[..., 0])
        found = torch.stack(tops, dim=1)
        padded = ~self.batch.mask.on(found.device)
        if self.batch.kept is not None:
            padded = self.batch.kept.on(found.device) < 0
        return {"top_token": found.masked_fill(padded[:, None], -1)}


class Attribution(Recorder):
    """Log-probability increase and label logit of every head's output.

    Parameters
    ----------
    batch
        The batch.
    readout
        Of the labels.
    norm
        "own" or "frozen": see `twotower.attribution`.
    """

    group = "attribution"

    def __init__(self, batch: Batch, readout: Readout, norm: str) -> None:
        self.batch, self.readout, self.norm = batch, readout, norm
        self.base: list[torch.Tensor] = []
        self.outputs: list[torch.Tensor] = []

    def layer(self, view: LayerView) -> None:
        n_heads = view.z.shape[2]
        alone = torch.eye(n_heads, dtype=view.z.dtype, device=view.z.device)[..., None]
        z = view.z[:, -1:] * alone
        projection = view.architecture.projection(view.block)
        nothing = call(projection, torch.zeros_like(z[:1, :1]).flatten(-2))
        # A copy: a view would keep the whole stream of every layer.
        self.base.append(view.residual[:, -1].clone())
        self.outputs.append(call(projection, z.flatten(-2)) - nothing)

    def finish(self, end: End) -> dict[str, torch.Tensor]:
        spread = self.readout.spread(end.residual)
        heads, base = stack(self.outputs, end), stack(self.base, end).unsqueeze(2)
        vectors = torch.cat((base, base + heads), dim=2)
        if self.norm == "own":
            normed = end.final_norm(vectors.to(end.residual.dtype))
        else:
            normed = self.readout.frozen_norm(vectors, spread[:, None, None])
        logprobs = self.readout.logprobs(normed, end)
        self.final_logprobs = self.readout.logprobs(end.final_norm(end.residual), end)
        directions = self.readout.on(heads.device).label_directions
        return {
            "logprob_increase": logprobs[:, :, 1:] - logprobs[:, :, :1],
            "label_logit": heads.float() @ directions.T / spread.view(-1, 1, 1, 1),
        }


def stack(
    by_layer: list[Float[torch.Tensor, " B *rest"]], end: End
) -> Float[torch.Tensor, "B layer *rest"]:
    """(B, layer, ...) of what every layer has (B, ...), which may be on several devices."""
    return torch.stack([x.to(end.residual.device) for x in by_layer], dim=1)


def keep(
    values: Float[torch.Tensor, "B *rest T"], batch: Batch
) -> Float[torch.Tensor, "B *rest kept"]:
    """(B, ..., T) cut to the columns that the batch keeps; NaN where there is none."""
    if batch.kept is None:
        return values
    kept = batch.kept.on(values.device)
    shape = (len(kept), *[1] * (values.dim() - 2), -1)
    index = kept.clamp(min=0).view(shape).expand(*values.shape[:-1], -1)
    return values.gather(-1, index).masked_fill((kept < 0).view(shape), torch.nan)
