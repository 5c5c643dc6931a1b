"""Where positions take their information from: attention, summed by what is looked at."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import torch

from ..errors import InputError
from ..intervention import named
from .batch import Batch
from .collect import collect, dataset
from .content import scores
from .edits import position_mask
from .measure import measure
from .recorders import stack
from .walk import End, LayerView, Recorder

if TYPE_CHECKING:
    import xarray as xr

    from ..intervention import Positions
    from ..models import Model
    from ..prompts import Prompts

SOURCES = ("itself", "own text", "own rest", "other texts", "other labels", "other rest", "bos")
"""What a position can look at; every position it sees is one of these."""


@measure
def attention_shares(
    model: Model,
    prompts: Prompts,
    positions: Positions = "labels",
    *,
    batch_size: int | None = None,
    progress: bool | str = False,
) -> xr.Dataset:
    """How much of their attention some positions pay to what, in every head.

    Parameters
    ----------
    model, prompts
        What is measured.
    positions
        Positions that look: "labels", "last", "all", `twotower.at`, or a boolean (prompt,
        position) array.
    batch_size, progress
        As in `predict`.

    Returns
    -------
    xarray.Dataset
        share (prompt, layer, head, source): mean over the prompt's positions that look of
        the attention paid to each source; the sources sum to 1. "own" is the same
        demonstration, or the query for positions of the query; "rest" is what is neither
        text nor label there. NaN in prompts in which nothing looks.

    Raises
    ------
    InputError
        If the positions are not usable, or there are none.
    """
    queries = position_mask(prompts, positions)
    if not queries.any():
        raise InputError("positions are empty: nothing looks")
    make = shares_maker(prompts, queries)
    (arrays,) = collect(model, prompts, [make], batch_size=batch_size, progress=progress)
    return dataset(
        "shares",
        arrays,
        model,
        prompts,
        coordinates={"source": list(SOURCES)},
        positions=named(positions),
    )


def shares_maker(prompts: Prompts, queries: np.ndarray) -> Callable[[Batch], Shares]:
    """What makes the recorder of shares for each batch."""

    def make(batch: Batch) -> Shares:
        sources = _sources(prompts, batch)
        return Shares(batch, queries, sources)

    return make


class Shares(Recorder):
    """Attention of some positions, summed by source.

    Parameters
    ----------
    batch
        The batch.
    queries
        (prompt, position) boolean: positions that look, of all prompts.
    sources
        (B, T, T) number in `SOURCES` of what stands at a position (last dim) for one that
        looks.
    """

    group = "shares"

    def __init__(self, batch: Batch, queries: np.ndarray, sources: np.ndarray) -> None:
        looking = batch.part(queries).any(axis=0)
        self.n = batch.width - int(looking.argmax()) if looking.any() else 1
        self.queries = batch.everywhere(batch.part(queries)[:, -self.n :].astype(np.float32))
        is_source = sources[:, -self.n :, :, None] == np.arange(len(SOURCES))
        self.is_source = batch.everywhere(is_source.astype(np.float32))
        self.found: list[torch.Tensor] = []

    def layer(self, view: LayerView) -> None:
        device = view.z.device
        hidden = ~view.visible(self.n)[:, None]
        weights = scores(view, self.n).masked_fill(hidden, -torch.inf).softmax(dim=-1)
        queries, is_source = self.queries.on(device), self.is_source.on(device)
        share = torch.einsum("bhqk,bqks,bq->bhs", weights, is_source, queries)
        self.found.append(share / queries.sum(dim=1)[:, None, None])

    def finish(self, end: End) -> dict[str, torch.Tensor]:
        return {"share": stack(self.found, end)}


def _sources(prompts: Prompts, batch: Batch) -> np.ndarray:
    """(B, T, T) number in `SOURCES` of the key (last dim) for the query."""
    role, number = (batch.part(x) for x in (prompts.role, prompts.demonstration))
    text = (role == "text") | (role == "query")
    # An instruction before the demonstrations is not the query's own.
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
