"""Edges: effects of a part of the model on the answer through one head's queries, keys or values.

In the counterfactual run of an edge, one head reads a residual stream from which a source's write
is taken out; everything else up to this head is as in the clean run. Only the head's output at the
read positions changes, and all layers above follow. So an edge is a row (`rows`) that branches off
at the layer of its target, with another output of the target.

Shapes: G packs of S changed positions, A positions of a pack, n sources.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float

from ..edits.prepared import BatchChange
from ..models.rounding import Rounding
from ..walk.batch import Batch
from ..walk.everywhere import Everywhere
from ..walk.proof import Claim
from ..walk.readout import Readout
from ..walk.walk import End, LayerView, PassingView
from .counterfactuals import Group as Heads
from .counterfactuals import Plan, Step
from .layout import Layout
from .reads import HeadReads, Places, Stream
from .rows import Clean
from .sources import Group
from .sweep import Sweep
from .wiring import Wiring
from .writes import Writes


@dataclass(frozen=True)
class Edges:
    """Edges to measure.

    Attributes
    ----------
    sources
        Groups of sources.
    targets
        Heads (layer, head) into which edges lead.
    into
        Some of "q", "k", "v".
    keys_of
        (layer,) layer whose keys and values a layer uses.
    """

    sources: tuple[Group, ...]
    targets: tuple[tuple[int, int], ...]
    into: tuple[str, ...]
    keys_of: tuple[int, ...]

    def read_at(self, layer: int, into: str) -> int:
        """Return the layer whose residual stream a layer's queries, keys or values read."""
        return layer if into == "q" else self.keys_of[layer]

    @property
    def order(self) -> list[int]:
        """Numbers of the sources by their highest layer."""
        return sorted(range(len(self.sources)), key=lambda i: self.top(i))

    def top(self, number: int) -> int:
        """Return the highest layer of a group of sources."""
        return max(source.layer for source in self.sources[number])

    def below(self, layer: int) -> list[int]:
        """Return the numbers of the sources that write to what a layer reads, lowest first."""
        return [i for i in self.order if self.top(i) < layer]

    def heads_at(self, layer: int) -> list[int]:
        """Return the numbers of the targets' heads in a layer."""
        return [head for of, head in self.targets if of == layer]

    @property
    def layers(self) -> list[int]:
        """Layers of the targets."""
        return sorted({layer for layer, _ in self.targets})

    def listed(self) -> list[tuple[int, int, int, int]]:
        """Return (layer, source, head, place) of every edge, in the order of rows.

        `source` and `place` are indices, the latter into the flattened (source, target, into).
        """
        column = {target: i for i, target in enumerate(self.targets)}
        found = []
        for layer in self.layers:
            for k, into in enumerate(self.into):
                for i in self.below(self.read_at(layer, into)):
                    for head in self.heads_at(layer):
                        j = column[layer, head]
                        place = (i * len(self.targets) + j) * len(self.into) + k
                        found.append((layer, i, head, place))
        return found


class EdgeChange:
    """The targets' new outputs in the rows of edges."""

    def __init__(self, change: BatchChange, chunks: Sequence[dict[int, tuple[int, int]]]) -> None:
        self.change, self.chunks = change, chunks
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
        return torch.where(chosen[None, :, None, :, None], new.unsqueeze(3), z)


class EdgeSweep(Sweep):
    """Recorder of the effects of edges.

    Parameters
    ----------
    batch, readout, layout, unembedded, layer_devices, rounding
        As of `Sweep`.
    edges
        The edges.
    change
        Change of the sources' outputs at the changed positions, followed by the columns of
        `places`.
    places
        Positions of the packs, and those at which keys and values read another stream.
    wiring
        Wiring of every layer with heads.
    rows, reads
        Rows that pass through the layers at a time, and sources whose reads are computed at a time.
    """

    def __init__(
        self,
        batch: Batch,
        readout: Readout,
        layout: Layout,
        edges: Edges,
        change: BatchChange,
        places: Places,
        wiring: dict[int, Wiring],
        rows: int,
        reads: int,
        unembedded: int,
        layer_devices: Sequence[torch.device],
        rounding: Rounding | None,
    ) -> None:
        self.edges, self.at, self.wiring, self.reads_at_once = edges, places, wiring, reads
        listed = edges.listed()
        self.listed = [listed[i : i + rows] for i in range(0, len(listed), rows)]
        architecture_layers = range(len(readout.heads_in))
        first = edges.layers[0]
        self.first = 0 if any(edges.keys_of[i] != i for i in architecture_layers) else first
        starts = dict.fromkeys(architecture_layers, 0)
        chunks: list[dict[int, tuple[int, int]]] = []
        for chunk in self.listed:
            chunks.append({})
            for layer in {edge[0] for edge in chunk}:
                n = sum(edge[0] == layer for edge in chunk)
                chunks[-1][layer] = (starts[layer], starts[layer] + n)
                starts[layer] += n
        parts: list[list[Heads]] = [[((edge[0], edge[2]),) for edge in c] for c in self.listed]
        shape = (len(edges.sources), len(edges.targets), len(edges.into))
        where = [edge[3] for edge in listed]
        changes = EdgeChange(change, chunks)
        Sweep.__init__(
            self,
            batch,
            readout,
            layout,
            changes,
            parts,
            unembedded,
            shape,
            where,
            layer_devices,
            "edges",
            rounding,
        )
        self.edge_change = changes
        self.n_changed = layout.n_changed
        self.sources = sorted({source for group in edges.sources for source in group})
        self.index = Everywhere(
            torch.cat((layout.source.own, places.columns.own), dim=1), batch.devices
        )
        self.writes: Writes | None = None
        self.heads: dict[int, HeadReads] = {}
        self.streams: dict[int, Stream] = {}

    def plan(self, chunks: Sequence[Sequence[Heads]], n_layers: int) -> list[Plan]:
        """Return the plan of each chunk; edges are rows that branch off the clean run."""
        plans = []
        for number, chunk in enumerate(chunks):
            start = self.edges.layers[0] if number == 0 else chunk[0][0][0]
            proved = self.rounding is not None
            steps, unchanged = [], []
            n = 0
            for layer in range(n_layers):
                heads: list[tuple[int, ...]] = [(h,) for ((at, h),) in chunk if at == layer]
                if proved and layer == start:
                    heads.insert(0, ())
                steps.append(Step(n, list(range(n)), [-1] * len(heads), heads))
                n += len(heads)
                unchanged.append(0 if proved and layer >= start else None)
            order = list(range(proved, len(chunk) + proved))
            plans.append(Plan(steps, order, unchanged))
        return plans

    def layer(self, view: LayerView) -> None:
        self._keep(view)
        edges, places = self.edges, self.at
        wanted = {edges.read_at(layer, "k") for layer in edges.layers}
        if set(edges.into) != {"q"} and view.index in wanted:
            self.streams[view.index] = Stream.of(view, self.wiring[view.index], places.columns)
        if view.index in edges.layers:
            queries = None
            if "q" in edges.into:
                queries = Stream.of(view, self.wiring[view.index], self.layout.source)
            keys = self.streams.get(edges.keys_of[view.index])
            self.heads[view.index] = HeadReads.of(view, self.layout, places, queries, keys)

    def passing(self, view: PassingView) -> None:
        self._keep(view)

    def _keep(self, view: LayerView | PassingView) -> None:
        if self.writes is None:
            change = self.edge_change.change
            self.writes = Writes(view.architecture, self.sources, self.index, change)
        self.writes.keep(view)
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
        edges = self.edges
        found: dict[tuple[int, str], list[torch.Tensor]] = {
            (layer, into): [] for layer in edges.layers for into in edges.into
        }
        assert self.writes is not None
        order = edges.order
        while order:
            top = edges.top(order[0])
            some = [i for i in order[: self.reads_at_once] if edges.top(i) == top]
            order = order[len(some) :]
            lost: dict[str, torch.Tensor] = {}
            groups = [edges.sources[i] for i in some]
            for (layer, into), parts in found.items():
                read_at = edges.read_at(layer, into)
                if top >= read_at:
                    continue
                reads = self.heads[layer]
                side = "queries" if into == "q" else "keys"
                if side not in lost:
                    n = self.n_changed
                    columns = slice(None, n) if into == "q" else slice(n, None)
                    lost[side] = self.writes.changed(groups, columns, reads.z.device)
                own = self.writes.scaled(lost[side].to(reads.z.device), top + 1, read_at)
                heads = edges.heads_at(layer)
                z = reads.z_after(own, into, heads, self.layout, self.at)
                parts.append(z.to(reads.z.dtype))
        for layer in edges.layers:
            every = []
            for into in edges.into:
                parts = found[layer, into]
                if parts:  # (G, sources, S, heads, D) to (G, sources heads, S, D)
                    every.append(torch.cat(parts, dim=1).transpose(2, 3).flatten(1, 2))
                if self.rounding is not None:
                    self._claim_unchanged(layer, into)
            if every:
                self.edge_change.z[layer] = torch.cat(every, dim=1)
        self.heads, self.streams = {}, {}
        self.writes = None

    def _claim_unchanged(self, layer: int, into: str) -> None:
        """Claim that heads which read the unchanged stream give their own outputs."""
        reads, layout = self.heads[layer], self.layout
        stream = reads.queries if into == "q" else reads.keys
        assert stream is not None and self.rounding is not None
        nothing = torch.zeros_like(stream.x[:, None], dtype=torch.float32)
        heads = range(reads.z.shape[2])
        again = reads.z_after(nothing, into, heads, layout, self.at)
        both = torch.cat((again.to(reads.z.dtype), reads.z[:, None]), dim=1)
        last = layout.by_prompt(layout.row_ends(both))[:, :, -1].float()  # (B, 2, H, D)
        error = (last[:, 0] - last[:, 1]).norm(dim=-1)
        size = reads.size.clamp(min=torch.finfo(torch.float32).tiny)
        error = (error / size).nan_to_num(nan=torch.inf)
        dtype = reads.z.dtype
        allowed = self.rounding.attention(dtype, reads.score, reads.products)
        allowed = allowed + self.rounding.module(dtype) * (1 + reads.products)
        self.claims.append(Claim("unchanged edge", [layer], error[None], allowed[None]))
