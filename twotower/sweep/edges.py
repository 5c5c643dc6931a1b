"""Edges: effects of a part of the model on the answer through one head's queries, keys or values.

In the counterfactual run of an edge, one head reads a residual stream from which a source's write
is taken out; everything else up to this head is as in the clean run. Only the head's output at the
read positions changes, and all layers above follow. So an edge is a row (`rows`) that branches off
at the layer of its target, with another output of the target.

Shapes: G packs of S changed positions, A positions of a pack, n sources.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from jaxtyping import Float

from ..edits.prepared import BatchChange
from ..models.rounding import Rounding
from ..walk.batch import Batch
from ..walk.everywhere import Everywhere
from ..walk.readout import Readout
from ..walk.views import End, LayerView, PassingView
from .counterfactuals import Group as Heads
from .counterfactuals import Plan, Step
from .layout import Layout
from .reading import Reading
from .rows import Clean
from .sweep import Sweep


class EdgeChange:
    """The targets' new outputs in the rows of edges.

    Parameters
    ----------
    change
        Change of the sources' outputs.
    at
        (G, S) boolean: positions at which the targets' outputs change.
    chunks
        For each chunk of rows and each layer: first and last edge of the layer.
    """

    def __init__(
        self, change: BatchChange, at: Everywhere, chunks: Sequence[dict[int, tuple[int, int]]]
    ) -> None:
        self.change, self.at, self.chunks = change, at, chunks
        self.chunk = 0
        self.z: dict[int, torch.Tensor] = {}

    def apply(
        self,
        z: Float[torch.Tensor, "G n_or_1 end H D"],
        swap: Everywhere,
        layer: int,
        last: Layout | None,
    ) -> Float[torch.Tensor, "G n end H D"]:
        """Return z (G, n, S, H, D) with each row's target changed, from (G, 1, S, H, D)."""
        chosen = swap.on(z.device)
        start, stop = self.chunks[self.chunk].get(layer, (0, 0))
        new = z.new_zeros(*z.shape[:3], z.shape[-1])
        if stop > start:
            new = self.z[layer][:, start:stop].to(z.device)
            new = new if last is None else last.row_ends(new)
        missing = len(chosen) - (stop - start)  # the unchanged row comes first
        if missing and stop > start:
            new = torch.cat((torch.zeros_like(new[:, :1]), new), dim=1)
        at = self.at.on(z.device)
        at = at if last is None else last.ends(at)
        where = chosen[None, :, None, :, None] & at[:, None, :, None, None]
        return torch.where(where, new.unsqueeze(3), z)


class EdgeSweep(Sweep):
    """Recorder of the effects of edges.

    Parameters
    ----------
    batch, readout, layout, unembedded, layer_devices, rounding
        As of `Sweep`.
    reading
        The edges, and what their sources wrote and targets read.
    rows
        Rows that pass through the layers at a time.
    """

    def __init__(
        self,
        batch: Batch,
        readout: Readout,
        layout: Layout,
        reading: Reading,
        rows: int,
        unembedded: int,
        layer_devices: Sequence[torch.device],
        rounding: Rounding | None,
    ) -> None:
        edges = reading.edges
        self.reading, self.edges, listed = reading, edges, edges.listed
        chunks = [listed[i : i + rows] for i in range(0, len(listed), rows)]
        layers = range(len(readout.heads_in))
        shared = any(edges.keys_of[layer] != layer for layer in layers)
        self.first = 0 if shared else edges.layers[0]
        self.edge_change = EdgeChange(reading.change, reading.at, _spans(chunks))
        groups: list[list[Heads]] = [[((edge[0], edge[2]),) for edge in c] for c in chunks]
        how = (
            unembedded,
            edges.exist.shape,
            [edge[3] for edge in listed],
            layer_devices,
            "edges",
            rounding,
        )
        Sweep.__init__(self, batch, readout, layout, self.edge_change, groups, *how)

    def plan(self, chunks: Sequence[Sequence[Heads]], n_layers: int) -> list[Plan]:
        """Return the plan of each chunk; edges are rows that branch off the clean run."""
        return [
            _plan(chunk, n_layers, self.edges.layers[0] if number == 0 else chunk[0][0][0])
            if self.rounding is not None
            else _plan(chunk, n_layers)
            for number, chunk in enumerate(chunks)
        ]

    def layer(self, view: LayerView) -> None:
        self._keep(view)

    def passing(self, view: PassingView) -> None:
        self._keep(view)

    def _keep(self, view: LayerView | PassingView) -> None:
        self.reading.keep(view)
        if view.index >= self.first:
            entered = any(moves[view.index].n_before for moves in self.moves)
            self.layers.append(Clean.of(view, self.layout, entered))

    def finish(self, end: End) -> dict[str, torch.Tensor]:
        self._read()
        return Sweep.finish(self, end)

    def _chunk(self, chunk: int) -> Float[torch.Tensor, "G n Q d_model"]:
        self.edge_change.chunk, self.carried = chunk, {}
        return Sweep._chunk(self, chunk)

    def _read(self) -> None:
        """Compute the targets' outputs of all edges."""
        reading, edges, every = self.reading, self.edges, self.edge_change.z
        places: dict[tuple[int, str], int] = {}
        for layer in edges.layers:
            n, z, heads = 0, reading.heads[layer].z, len(edges.heads_at(layer))
            for into in edges.into:
                places[layer, into] = n
                n += len(edges.below(edges.read_at(layer, into))) * heads
            if n:
                every[layer] = z.new_empty(len(z), n, z.shape[1], z.shape[-1])
        for _, layer, into, changed in reading.changes():
            # (G, sources, S, heads, D) to (G, sources heads, S, D)
            z = changed.z.transpose(2, 3).flatten(1, 2)
            start = places[layer, into]
            places[layer, into] = stop = start + z.shape[1]
            every[layer][:, start:stop] = z.to(every[layer].dtype)
        if self.rounding is not None:
            for layer in edges.layers:
                for into in edges.into:
                    self.claims.append(reading.claim(layer, into, self.rounding))
        del self.reading  # what it keeps is not needed while rows pass through the layers


def _spans(chunks: Sequence[Sequence[tuple[int, ...]]]) -> list[dict[int, tuple[int, int]]]:
    """Return for each chunk and layer which of the layer's edges are in the chunk."""
    starts: dict[int, int] = {}
    spans: list[dict[int, tuple[int, int]]] = []
    for chunk in chunks:
        spans.append({})
        for layer, n in Counter(edge[0] for edge in chunk).items():
            start = starts.get(layer, 0)
            spans[-1][layer] = (start, start + n)
            starts[layer] = start + n
    return spans


def _plan(chunk: Sequence[Heads], n_layers: int, unchanged: int | None = None) -> Plan:
    """Return the plan of a chunk, perhaps with an unchanged run that starts at a layer."""
    steps: list[Step] = []
    at: list[int | None] = []
    n = 0
    for layer in range(n_layers):
        heads: list[tuple[int, ...]] = [(head,) for ((own, head),) in chunk if own == layer]
        if layer == unchanged:
            heads.insert(0, ())
        steps.append(Step(n, list(range(n)), [-1] * len(heads), heads))
        n += len(heads)
        at.append(None if unchanged is None or layer < unchanged else 0)
    first = 0 if unchanged is None else 1
    return Plan(steps, list(range(first, len(chunk) + first)), at)
