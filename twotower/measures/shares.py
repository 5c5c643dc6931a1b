"""Attention shares: how much attention goes to each kind of position."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..errors import InputError
from ..models.rounding import Rounding
from ..prompts.positions import position_mask
from ..walk.attended import claim_attention
from ..walk.batch import Batch
from ..walk.proof import Claim
from ..walk.recorder import Recorder
from ..walk.scores import attention, scores
from ..walk.tensors import stack_heads
from ..walk.views import End, LayerView
from .collect import run
from .measure import MakeRecorder, Measure

if TYPE_CHECKING:
    import xarray as xr

    from ..models import Model
    from ..prompts import Prompts
    from ..prompts.positions import Positions

SOURCES = ("itself", "own text", "own rest", "other texts", "other labels", "other rest", "bos")
"""Kinds of positions to attend to. Every visible position belongs to exactly one kind."""


def attention_shares(model: Model, prompts: Prompts, positions: Positions = "labels") -> xr.Dataset:
    """Return how much attention each head pays to each kind of position.

    Parameters
    ----------
    model, prompts
        Model and prompts to measure.
    positions
        Positions that attend: "labels", "last", "all", `twotower.at`, or a boolean (prompt,
        position) array.

    Returns
    -------
    xarray.Dataset
        share (prompt, layer, head, source): attention to each source, averaged over the
        prompt's attending positions. The sources sum to 1. "own" means the same demonstration
        (or the query, for positions of the query); "rest" is neither text nor label. NaN for
        prompts without an attending position.

    Raises
    ------
    InputError
        If the positions are invalid or empty.
    """
    return run(model, prompts, AttentionShares(positions))


@dataclass(frozen=True, eq=False)
class AttentionShares(Measure):
    """The measure behind `attention_shares`, with its settings."""

    group = "shares"

    positions: Positions = "labels"

    def prepare(self, model: Model, prompts: Prompts) -> MakeRecorder:
        queries = position_mask(prompts, self.positions)
        if not queries.any():
            raise InputError("positions are empty: no position attends")
        rounding = Rounding.of_proof(model)
        return lambda batch: SharesRecorder(batch, queries, _sources(prompts, batch), rounding)

    def coordinates(self) -> Mapping[str, Any]:
        return {"source": list(SOURCES)}


class SharesRecorder(Recorder):
    """Records the attention of the given positions, summed by source.

    Parameters
    ----------
    batch
        The batch.
    queries
        (prompt, position) boolean: query positions, of all prompts.
    sources
        (B, T, T) index in `SOURCES` of each key position (last dim) for each query position.
    rounding
        Errors that the model's arithmetic allows; None to leave out the proof.
    """

    group = "shares"

    def __init__(
        self, batch: Batch, queries: np.ndarray, sources: np.ndarray, rounding: Rounding | None
    ) -> None:
        looking = batch.part(queries).any(axis=0)
        self.n = batch.width - int(looking.argmax()) if looking.any() else 1
        self.queries = batch.everywhere(batch.part(queries)[:, -self.n :].astype(np.float32))
        is_source = sources[:, -self.n :, :, None] == np.arange(len(SOURCES))
        self.is_source = batch.everywhere(is_source.astype(np.float32))
        self.found: list[torch.Tensor] = []
        self.rounding = rounding
        self.claims: list[Claim] = []

    def layer(self, view: LayerView) -> None:
        device = view.z.device
        plain = scores(view, self.n)
        weights = attention(view, plain)
        if self.rounding is not None:
            self.claims.append(claim_attention(view, plain, weights, self.rounding))
        queries, is_source = self.queries.on(device), self.is_source.on(device)
        share = torch.einsum("bhqk,bqks,bq->bhs", weights, is_source, queries)
        self.found.append(share / queries.sum(dim=1)[:, None, None])

    def finish(self, end: End) -> dict[str, torch.Tensor]:
        return {"share": stack_heads(self.found, end)}


def _sources(prompts: Prompts, batch: Batch) -> np.ndarray:
    """Return (B, T, T) the index in `SOURCES` of each key (last dim) for each query."""
    role, number = (batch.part(x) for x in (prompts.role, prompts.demonstration))
    text = (role == "text") | (role == "query")
    # An instruction before the demonstrations has number -1 too, but is not part of the query.
    before = (number < 0) & ~np.logical_or.accumulate(number >= 0, axis=1)
    before &= (number >= 0).any(axis=1, keepdims=True)
    own = (number[:, :, None] == number[:, None]) & ~before[:, None]
    kind = np.where(text, SOURCES.index("other texts"), SOURCES.index("other rest"))
    kind = np.where(role == "label", SOURCES.index("other labels"), kind)
    mine = np.where(text, SOURCES.index("own text"), SOURCES.index("own rest"))
    found = np.where(own, mine[:, None], kind[:, None])
    found = np.where((role == "bos")[:, None], SOURCES.index("bos"), found)
    width = role.shape[1]
    found[:, np.arange(width), np.arange(width)] = SOURCES.index("itself")
    return found
