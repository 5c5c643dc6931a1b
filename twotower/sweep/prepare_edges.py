"""Preparation of edges: sources, targets, positions, and chunks that fit the memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from ..edits.changes import Change, Zero
from ..edits.prepared import prepare_change
from ..edits.sources import Group
from ..edits.wiring import get_wiring
from ..edits.writes import parts_of
from ..errors import InputError
from ..models.rounding import Rounding
from ..options import option
from ..prompts.positions import position_mask
from ..prompts.sequences import Continued
from ..walk.batch import Batch
from ..walk.everywhere import Everywhere
from ..walk.judge import refuse
from ..walk.readouts import Readouts
from .edge_list import Edges
from .edges import EdgeSweep
from .layout import Layout, make_layout
from .memory import edges_fit
from .reading import Reading
from .reads import Places

if TYPE_CHECKING:
    from ..models import Model
    from ..prompts import Prompts
    from ..prompts.positions import Positions


def make_edges(
    model: Model,
    sources: Sequence[Group],
    targets: Sequence[tuple[int, int]],
    into: Sequence[str],
) -> Edges:
    """Return the edges from all sources into all targets that exist.

    Raises
    ------
    InputError
        If no source lies below a target.
    """
    architecture = model.architecture
    keys_of = [
        architecture.keys_of(layer) if architecture.has_heads(layer) else layer
        for layer in range(model.n_layers)
    ]
    edges = Edges(tuple(sources), tuple(targets), tuple(into), tuple(keys_of))
    if not edges.listed:
        raise InputError(
            "there is no edge: no source lies below what a target reads; a source must be in a "
            "lower layer than its target"
        )
    return edges


def prepare_reading(
    model: Model,
    prompts: Prompts,
    edges: Edges,
    positions: Positions,
    to: Change,
    outputs: Positions = "last",
) -> Callable[[Batch, int], Reading]:
    """Return a function that makes what a batch's walk keeps of sources and targets.

    Parameters
    ----------
    model, prompts, edges, positions, to, outputs
        As of `prepare_edges`.
    """
    if option("proof") and model.state is not None:
        refuse(model, model.state.unfollowed())
    last = position_mask(prompts, outputs, "outputs")
    if not last.any():
        raise InputError("outputs are empty: no target's output would change")
    at = np.zeros_like(last)
    if set(edges.into) != {"q"}:
        at = position_mask(prompts, positions)
        if not at.any():
            raise InputError("positions are empty: keys and values would not change")
    sources = {source for group in edges.sources for source in group}
    others = {source.kind for source in sources} - {"head"}
    changed = at | last if "q" in edges.into else at
    change = prepare_change(to, model, prompts, changed, others)
    wiring = get_wiring(model)
    parts = parts_of(sources)

    def make(batch: Batch, at_once: int) -> Reading:
        layout = make_layout(
            batch.part(prompts.token_id),
            batch.part(last),
            np.zeros((len(batch.rows), batch.width), dtype=np.int64),
            6 * model.d_model,
            batch.devices,
            separate=True,
            reads=batch.answers.reads.own.numpy(),
        )
        places = _places(layout, torch.as_tensor(batch.part(at)), batch.devices)
        source = layout.source.own
        index = torch.cat((source, places.columns.own), dim=1)
        of_batch = change.for_batch(batch, parts, index)
        real = layout.owner.own >= 0
        own = batch.cut(last).map(lambda x: x.flatten()[source] & real)
        kept = Everywhere(index, batch.devices)
        return Reading(edges, layout, places, kept, of_batch, wiring, own, at_once)

    return make


def prepare_edges(
    model: Model,
    prompts: Prompts,
    edges: Edges,
    positions: Positions = "all",
    to: Change = Zero(),
    outputs: Positions = "last",
    *,
    logprobs: bool = False,
) -> Callable[[Batch], EdgeSweep]:
    """Return a function that builds the recorder of edges for a batch.

    Parameters
    ----------
    model, prompts
        Model and prompts to measure.
    edges
        The edges.
    positions
        Positions at which keys and values read the changed stream.
    to
        New outputs of the sources.
    outputs
        Positions at which the targets' outputs change, and their queries read the changed stream.
    logprobs
        Whether to return drops of log-probabilities too.

    Raises
    ------
    CheckError
        If the model has active interventions that a sweep cannot reproduce in its rows.
    InputError
        If no position would be changed, or the change does not fit the prompts.
    """
    read = prepare_reading(model, prompts, edges, positions, to, outputs)
    readouts = Readouts(model, prompts)
    logprobs = logprobs or isinstance(prompts, Continued) or prompts.answers.alone
    n_edges = len(edges.listed)

    def make(batch: Batch) -> EdgeSweep:
        reading = read(batch, 1)
        columns = reading.index.own.shape[1]
        sizes = (columns, n_edges, logprobs, edges.together)
        fit = edges_fit(model, reading.layout, batch.width, *sizes)
        reading.at_once = fit.reads
        return EdgeSweep(
            batch,
            readouts.of(batch),
            reading.layout,
            reading,
            fit.rows,
            fit.vectors if logprobs else 0,
            model.layer_devices,
            Rounding.of_proof(model),
        )

    return make


def _places(layout: Layout, at: torch.Tensor, devices: Sequence[torch.device]) -> Places:
    """Return the positions of a batch's packs, and those at which keys and values change."""
    every = layout.every.own
    wanted = at.flatten()[every] & layout.visible.own.any(dim=1)
    n_columns = int(wanted.sum(dim=1).max())
    # Packs with fewer such positions get others, where nothing is taken out of the stream.
    inside = wanted.int().argsort(dim=1, descending=True, stable=True)[:, :n_columns]
    columns = every.gather(1, inside)

    def on(x: torch.Tensor) -> Everywhere:
        return Everywhere(x, devices)

    filled = wanted.gather(1, inside)
    return Places(on(columns), on(inside), on(filled), bool(filled.all()))
