"""What heads read: queries, keys and values of a layer after a change of the stream they read.

Shapes: G packs, S changed positions, A = E + S positions of a pack, M of them at which keys and
values change; n changes, H heads on K key-value heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Float32, Int

from ..edits.remainder import take_out
from ..edits.wiring import Wiring
from ..models import Architecture
from ..models.positions import Positions, softcapped, softmax
from ..walk.everywhere import Everywhere
from ..walk.views import LayerView
from .at_index import bias_at, tables_at
from .layout import Layout


@dataclass
class Places:
    """Positions at which keys and values change, as indices into the flattened (B T) positions.

    Attributes
    ----------
    columns
        (G, M) those at which keys and values change.
    inside
        (G, M) index of `columns` in all positions of a pack (`Layout.every`).
    wanted
        (G, M) boolean: False at columns that only fill up a pack, where nothing changes.
    full
        Whether there are no such columns.
    """

    columns: Everywhere
    inside: Everywhere
    wanted: Everywhere
    full: bool


@dataclass
class Stream:
    """A residual stream that is read, and what projects it.

    Attributes
    ----------
    x
        (G, C, d_model) the stream at some positions.
    rounding
        (G, C, d_model) the stream less its exact value; None if it is not followed.
    positions
        Rotary tables and factors (G, 1, C, ...) of these positions.
    """

    architecture: Architecture
    block: Any
    wiring: Wiring
    x: Float[torch.Tensor, "G C d_model"]
    rounding: Float[torch.Tensor, "G C d_model"] | None
    positions: Positions

    @classmethod
    def of(
        cls,
        view: LayerView,
        wiring: Wiring,
        index: Everywhere,
        rounding: Float[torch.Tensor, "G C d_model"] | None,
    ) -> Stream:
        """Return copies of a layer's stream at some positions."""
        of = (view.architecture, view.block, wiring)
        return cls(*of, index.take(view.residual), rounding, tables_at(view, index))

    def read(
        self, lost: Float[torch.Tensor, "G n C d_model"], into: str
    ) -> Float[torch.Tensor, "G n C heads d"]:
        """Return queries, keys or values, as they are multiplied, of the stream less `lost`."""
        rounding = None if self.rounding is None else self.rounding[:, None]
        changed = take_out(self.x[:, None], rounding, lost.to(self.x.device)).to(self.x.dtype)
        normed = self.architecture.attention_input(self.block, changed)
        found = self.wiring.project(self.architecture, self.block, normed, into)
        if into == "v":
            return found
        return self.architecture.turn(self.block, found, self.positions, query=into == "q")


@dataclass
class HeadReads:
    """The heads of a layer, and what they read in the clean run.

    Attributes
    ----------
    queries, keys
        Streams from which queries, and keys and values, are made; None if none of them change.
    query
        (G, S, H, d_key) queries after rotary.
    key, value
        (G, A, K, ...) keys after rotary, and values.
    z
        (G, S, H, D) heads' outputs.
    gate
        (G, S, H, ...) factor on the heads' outputs; None without.
    scale, cap
        Factor and softcap of scores.
    bias
        (G, H, A) added to the scores for each key; None without.
    sinks
        (H,) scores of the heads' sinks; None without.
    reach
        Window and chunk of the layer.
    size
        (B, H) largest norm of a visible value, times the gate.
    score, products
        (B, H) sizes of the last position's scores, as in `LayerView`.
    known
        (G, 1, h, S, A) clean scores of some heads.
    """

    index: int
    queries: Stream | None
    keys: Stream | None
    query: Float[torch.Tensor, "G S H d_key"]
    key: Float[torch.Tensor, "G A K d_key"]
    value: Float[torch.Tensor, "G A K D"]
    z: Float[torch.Tensor, "G S H D"]
    gate: Float[torch.Tensor, "G S H gated"] | None
    scale: float
    cap: float | None
    bias: Float[torch.Tensor, "G H A"] | None
    sinks: Float[torch.Tensor, " H"] | None
    reach: tuple[int | None, int | None]
    size: Float32[torch.Tensor, "B H"]
    score: Float32[torch.Tensor, "B H"]
    products: Float32[torch.Tensor, "B H"]
    known: dict[tuple[int, ...], torch.Tensor] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        view: LayerView,
        layout: Layout,
        queries: Stream | None,
        keys: Stream | None,
    ) -> HeadReads:
        """Return copies of the tensors in a layer's view that edges into its heads need."""
        architecture, source = view.architecture, layout.source
        query = view.turn(view.query, slice(None), query=True)
        norms = view.value.float().norm(dim=-1)
        size = norms.masked_fill(view.hidden()[:, 0, :, None], 0).amax(dim=1)
        size = size.repeat_interleave(view.z.shape[2] // size.shape[1], dim=1)
        if view.gate is not None:
            size = size * view.gate[:, -1].float().abs().amax(dim=-1)
        return cls(
            view.index,
            queries,
            keys,
            source.take(query),
            layout.every.take(view.turned_key),
            layout.every.take(view.value),
            source.take(view.z),
            None if view.gate is None else source.take(view.gate),
            architecture.scaling(view.index),
            architecture.score_softcap,
            bias_at(view, layout.every),
            view.sinks,
            (architecture.window(view.index), architecture.chunk(view.index)),
            size,
            view.last.score_size,
            view.last.product_size,
        )

    def after(
        self,
        lost: Float[torch.Tensor, "G n C d_model"],
        into: str,
        heads: Sequence[int],
        layout: Layout,
        places: Places,
    ) -> Changed:
        """Return what heads compute after a change of what queries, keys or values read.

        Parameters
        ----------
        lost
            Vectors to subtract from the stream: at the changed positions (C = S) for queries, at
            the columns (C = M) for keys and values.
        into
            "q", "k" or "v".
        heads
            Numbers of the heads.
        layout, places
            Layout of the batch, and its positions.
        """
        stream = self.queries if into == "q" else self.keys
        assert stream is not None
        if into != "q" and not places.full:
            lost = lost * places.wanted.on(lost.device)[:, None, :, None]
        new = stream.read(lost, into).to(self.z.device)
        if into == "q":
            scores = self._scores(some_heads(new, heads), self._keys(self.key, heads)[:, None])
            return Changed(self, heads, self._masked(scores, heads, layout))
        clean = self._clean_scores(heads, layout)
        new = self._keys(new, heads)
        inside = places.inside.on(self.z.device)
        if into == "v":
            return Changed(self, heads, clean, new, inside)
        scores = self._scores(some_heads(self.query, heads)[:, None], new)
        scores = self._masked(scores, heads, layout, inside)
        index = inside[:, None, None, None].expand_as(scores)
        every = clean.expand(-1, new.shape[1], -1, -1, -1)
        return Changed(self, heads, every.scatter(-1, index, scores))

    def _scores(
        self,
        query: Float[torch.Tensor, "G one_or_n S h d_key"],
        key: Float[torch.Tensor, "G rows m h d_key"],
    ) -> Float32[torch.Tensor, "G n h S m"]:
        """Return scores of queries and keys, without biases and unmasked."""
        queries, keys = (x.float().transpose(2, 3) for x in (query, key))
        return softcapped((queries @ keys.mT) * self.scale, self.cap)

    def _masked(
        self,
        scores: Float32[torch.Tensor, "G n h S m"],
        heads: Sequence[int],
        layout: Layout,
        inside: Int[torch.Tensor, "G m"] | None = None,
    ) -> Float32[torch.Tensor, "G n h S m"]:
        """Return scores with biases, -inf at hidden keys; by default of all keys."""
        seen = layout.seen(*self.reach, False, scores.device)
        bias = None
        if self.bias is not None:
            bias = torch.stack([self.bias[:, head] for head in heads], dim=1)
        if inside is not None:
            seen = seen.gather(2, inside[:, None].expand(-1, seen.shape[1], -1))
            if bias is not None:
                bias = bias.gather(2, inside[:, None].expand(-1, bias.shape[1], -1))
        if bias is not None:
            scores = scores + bias[:, None, :, None]
        return scores.masked_fill(~seen[:, None, None], -torch.inf)

    def _clean_scores(
        self, heads: Sequence[int], layout: Layout
    ) -> Float32[torch.Tensor, "G 1 h S A"]:
        asked = tuple(heads)
        if asked not in self.known:
            query, key = some_heads(self.query, heads), self._keys(self.key, heads)
            scores = self._scores(query[:, None], key[:, None])
            self.known[asked] = self._masked(scores, heads, layout)
        return self.known[asked]

    def _keys(
        self, x: Float[torch.Tensor, "*rest K d"], heads: Sequence[int]
    ) -> Float[torch.Tensor, "*rest h d"]:
        """Return each head's view of its key-value head."""
        per = self.z.shape[2] // self.key.shape[2]
        return some_heads(x, [head // per for head in heads])


@dataclass
class Changed:
    """Heads of a layer after a change of what they read.

    Attributes
    ----------
    reads
        The heads in the clean run.
    heads
        Numbers of the heads.
    scores
        (G, n or 1, h, S, A) their scores, -inf at hidden keys.
    values
        (G, n, M, h, D) their values at the columns; None if they did not change.
    inside
        (G, M) index of the columns in all positions; None without values.
    """

    reads: HeadReads
    heads: Sequence[int]
    scores: Float32[torch.Tensor, "G rows h S A"]
    values: Float[torch.Tensor, "G n m h D"] | None = None
    inside: Int[torch.Tensor, "G m"] | None = None

    @property
    def weights(self) -> Float32[torch.Tensor, "G rows h S A"]:
        """Attention weights."""
        sinks = self.reads.sinks
        if sinks is not None:
            sinks = torch.stack([sinks[head] for head in self.heads])[:, None]
        return softmax(self.scores, sinks)

    @property
    def z(self) -> Float32[torch.Tensor, "G n S h D"]:
        """The heads' outputs."""
        reads = self.reads
        values = reads._keys(reads.value, self.heads)
        if self.values is None:
            # (G, h, n S, A) @ (G, h, A, D), so that all rows of a head are one matrix.
            weights = self.weights.transpose(1, 2)
            rows: torch.Tensor = weights.flatten(2, 3) @ values.float().transpose(1, 2)
            z = rows.unflatten(2, tuple(weights.shape[2:4]))
            return self._gated(z.permute(0, 2, 3, 1, 4))
        assert self.inside is not None
        every = self.weights[:, 0]
        index = self.inside[:, None, None].expand(*every.shape[:3], -1)
        weights = every.gather(-1, index)
        index = self.inside[..., None, None].expand(-1, -1, *values.shape[2:])
        old = values.gather(1, index)[:, None]
        lost = self._gated(_summed(weights, old) - _summed(weights, self.values))
        own = some_heads(reads.z, self.heads).float()[:, None]
        rounding = None
        if reads.keys is not None and reads.keys.rounding is not None:
            rounding = own - self._gated(_summed(every, values[:, None]))
        return take_out(own, rounding, lost)

    def _gated(self, z: Float32[torch.Tensor, "G n S h D"]) -> Float32[torch.Tensor, "G n S h D"]:
        gate = self.reads.gate
        return z if gate is None else z * some_heads(gate, self.heads)[:, None]


def _summed(
    weights: Float[torch.Tensor, "G h S m"], values: Float[torch.Tensor, "G rows m h d"]
) -> Float[torch.Tensor, "G rows S h d"]:
    """Return sums of values over positions, weighted."""
    found: torch.Tensor = torch.einsum("ghsm,gnmhd->gnshd", weights, values.float())
    return found


def some_heads(
    x: Float[torch.Tensor, "*rest H d"], heads: Sequence[int]
) -> Float[torch.Tensor, "*rest h d"]:
    """Return some heads' part; an index would be copied from the CPU."""
    return torch.stack([x[..., head, :] for head in heads], dim=-2)
