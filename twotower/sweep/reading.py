"""All changes of what heads read: what sources wrote, taken out of what targets read.

Shapes: G packs of S changed positions, n sources.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from ..edits.prepared import BatchChange
from ..edits.wiring import Wiring
from ..edits.writes import Writes
from ..models.rounding import Rounding
from ..walk.everywhere import Everywhere
from ..walk.proof import Claim
from ..walk.views import LayerView, PassingView
from .edge_list import Edges
from .layout import Layout
from .reads import Changed, HeadReads, Places, Stream


class Reading:
    """Writes of the sources and inputs of the targets in the clean run, kept during a walk.

    Parameters
    ----------
    edges
        Sources and targets.
    layout, places
        Layout of the batch, its positions, and those at which keys and values read another stream.
    index
        (G, S + M) the changed positions, followed by the columns of `places`.
    change
        Change of the sources' outputs at the index.
    wiring
        Wiring of every layer with heads.
    at
        (G, S) boolean: positions at which the targets' outputs change.
    at_once
        Number of sources whose changes are computed together.
    """

    def __init__(
        self,
        edges: Edges,
        layout: Layout,
        places: Places,
        index: Everywhere,
        change: BatchChange,
        wiring: dict[int, Wiring],
        at: Everywhere,
        at_once: int,
    ) -> None:
        self.edges, self.layout, self.places = edges, layout, places
        self.change, self.wiring, self.at, self.at_once = change, wiring, at, at_once
        self.sources = sorted({source for group in edges.sources for source in group})
        self.index = index
        self.read_for_keys = {edges.read_at(layer, "k") for layer in edges.layers}
        self.writes: Writes | None = None
        self.heads: dict[int, HeadReads] = {}
        self.streams: dict[int, Stream] = {}

    def keep(self, view: LayerView | PassingView) -> None:
        """Keep what a layer's parts wrote and its heads read."""
        edges, layer = self.edges, view.index
        if self.writes is None:
            of = (view.architecture, self.sources, self.index, self.change, edges.together)
            self.writes = Writes(*of)
        self.writes.keep(view)
        rounding, n = self.writes.rounding, self.layout.n_changed
        if not isinstance(view, LayerView):
            return
        if set(edges.into) != {"q"} and layer in self.read_for_keys:
            of_keys = None if rounding is None else rounding[:, n:]
            place = self.places.columns
            self.streams[layer] = Stream.of(view, self.wiring[layer], place, of_keys)
        if layer in edges.layers:
            queries = None
            if "q" in edges.into:
                of_queries = None if rounding is None else rounding[:, :n]
                place = self.layout.source
                queries = Stream.of(view, self.wiring[layer], place, of_queries)
            keys = self.streams.get(edges.keys_of[layer])
            self.heads[layer] = HeadReads.of(view, self.layout, queries, keys)

    def changes(self) -> Iterator[tuple[list[int], int, str, Changed]]:
        """Yield some sources' numbers, a layer of targets, "q", "k" or "v", and the targets after.

        The sources of a layer and of "q", "k" or "v" come in the order of `Edges.order`.
        """
        edges, order = self.edges, list(self.edges.order)
        assert self.writes is not None
        while order:
            top = edges.top(order[0])
            some = [i for i in order[: self.at_once] if edges.top(i) == top]
            order = order[len(some) :]
            lost: dict[str, torch.Tensor] = {}
            groups = [edges.sources[i] for i in some]
            for layer in edges.layers:
                reads = self.heads[layer]
                for into in edges.into:
                    read_at = edges.read_at(layer, into)
                    if top >= read_at:
                        continue
                    side = "queries" if into == "q" else "keys"
                    if side not in lost:
                        n = self.layout.n_changed
                        columns = slice(None, n) if into == "q" else slice(n, None)
                        lost[side] = self.writes.changed(groups, columns, reads.z.device)
                    own = self.writes.scaled(lost[side].to(reads.z.device), top + 1, read_at)
                    heads = edges.heads_at(layer)
                    changed = reads.after(own, into, heads, self.layout, self.places)
                    yield some, layer, into, changed

    def unchanged(self, layer: int, into: str, heads: Sequence[int]) -> Changed:
        """Return heads of a layer after reading the clean stream once more."""
        reads = self.heads[layer]
        stream = reads.queries if into == "q" else reads.keys
        assert stream is not None
        nothing = torch.zeros_like(stream.x[:, None], dtype=torch.float32)
        return reads.after(nothing, into, heads, self.layout, self.places)

    def claim(self, layer: int, into: str, rounding: Rounding) -> Claim:
        """Claim that heads which read the clean stream once more give their own outputs."""
        reads, layout = self.heads[layer], self.layout
        own = reads.z
        again = self.unchanged(layer, into, range(own.shape[2])).z.to(own.dtype)
        both = torch.cat((again, own[:, None]), dim=1)
        last = layout.by_prompt(layout.row_ends(both))[:, :, -1].float()  # (B, 2, H, D)
        tiny = torch.finfo(torch.float32).tiny
        error = (last[:, 0] - last[:, 1]).norm(dim=-1) / reads.size.clamp(min=tiny)
        allowed = rounding.attention(own.dtype, reads.score, reads.products)
        # Queries and keys are projected again, among other rows.
        allowed = allowed + rounding.module(own.dtype) * (1 + reads.products)
        error = error.nan_to_num(nan=torch.inf)
        return Claim("unchanged edge", [layer], error[None], allowed[None])
