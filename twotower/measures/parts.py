"""Parts: a head's scores and what it writes, as sums over what its towers and values read."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float

from ..checks import yes_or_no
from ..edits.changes import Zero
from ..edits.frozen import Frozen, Pass
from ..edits.sources import POSITION, Source, all_sources
from ..errors import InputError
from ..head import Head, check_heads
from ..models.positions import Positions as Tables
from ..models.rounding import Rounding
from ..prompts.positions import named
from ..sweep.prepare_edges import make_edges, prepare_reading
from ..sweep.reading import Reading
from ..sweep.reads import HeadReads, Stream, some_heads
from ..walk.batch import Batch
from ..walk.everywhere import Everywhere
from ..walk.proof import Claim
from ..walk.readout import Readout
from ..walk.readouts import Readouts
from ..walk.recorder import Recorder
from ..walk.tensors import above_mean, keep
from ..walk.views import End, LayerView, PassingView
from .collect import collect
from .datasets import dataset
from .measure import MakeRecorder, Measure
from .measurement import measurement

if TYPE_CHECKING:
    import xarray as xr

    from ..models import Model
    from ..prompts import Prompts
    from ..prompts.positions import Positions

AT_ONCE = 32
"""Sources whose parts are computed together."""

BIASES = "biases"
"""Name of the part that belongs to no source: biases of norms and projections."""


@measurement
def score_parts(
    model: Model,
    prompts: Prompts,
    heads: Sequence[tuple[int, int]],
    *,
    keep: Positions = "labels",
    pairs: bool = False,
) -> xr.Dataset:
    """Return heads' QK scores as sums over what the query tower and the key tower read.

    Norms keep the statistics of the clean run ("frozen"), so that queries and keys are linear in
    what they read: the embedding, every head, every MLP below, and biases. A score is the sum of
    the products of all parts of the query with all parts of the key.

    Parameters
    ----------
    model, prompts
        Model and prompts to measure.
    heads
        Heads to explain.
    keep
        Positions of the keys, as in `qk_similarity`.
    pairs
        Whether to return the products of every part of the query with every part of the key, and
        not only those with the whole key and the whole query.

    Returns
    -------
    xarray.Dataset
        score (prompt, chosen, position) of the last position, before softcap and position biases;
        query_part and key_part (prompt, chosen, source, position), which both sum to it;
        query_part_content and key_part_content, the same at distance 0, or without the learned
        position embedding (as `score_content`): the rest is due to positions; with `pairs` also
        score_part (prompt, chosen, source, key_source, position). Parts of sources that are not
        below the head are 0.

    Raises
    ------
    InputError
        If a head is out of range, or `keep` selects no position.
    """
    yes_or_no("pairs", pairs)
    chosen = check_heads(heads, model)
    if not chosen:
        raise InputError("there are no heads")
    return _measured(model, prompts, ScoreParts(tuple(chosen), keep, pairs))


@measurement
def margin_parts(
    model: Model,
    prompts: Prompts,
    heads: Sequence[tuple[int, int]],
    *,
    keep: Positions = "all",
) -> xr.Dataset:
    """Return what heads write for the answer as a sum over what their values read.

    A head writes attention x value; its value at a position is linear in what it reads there, with
    frozen norms as in `score_parts`.

    Parameters
    ----------
    model, prompts, heads, keep
        As in `score_parts`; by default all positions, whose parts sum to the whole.

    Returns
    -------
    xarray.Dataset
        margin_part (prompt, chosen, source, position): right label's logit less the mean of the
        others', of the part of the head's output that comes from the source's write at the
        position. written (prompt, chosen): of the whole output.

    Raises
    ------
    InputError
        As `score_parts`.
    """
    chosen = check_heads(heads, model)
    if not chosen:
        raise InputError("there are no heads")
    return _measured(model, prompts, MarginParts(tuple(chosen), keep))


def _measured(model: Model, prompts: Prompts, measure: _Parts) -> xr.Dataset:
    (arrays,) = collect(model, prompts, [measure])
    return dataset(
        measure.group,
        arrays,
        model,
        prompts,
        measure.settings(),
        keep=measure.keep,
        coordinates=measure.names(model),
    )


@dataclass(frozen=True, eq=False)
class _Parts(Measure):
    """What `score_parts` and `margin_parts` share."""

    heads: tuple[tuple[int, int], ...]
    keep: Positions = "labels"

    def settings(self) -> dict[str, Any]:
        return {"keep": named(self.keep)}

    def names(self, model: Model) -> Mapping[str, Any]:
        """Return the coordinates of heads and sources."""
        return {
            "chosen": [str(Head(*head)) for head in self.heads],
            "source": [*map(str, self.sources(model)), BIASES],
        }

    def sources(self, model: Model) -> list[Source]:
        """Return all sources below the highest of the heads."""
        found = all_sources(model, max(layer for layer, _ in self.heads))
        learned = model.architecture.learned_positions_path is not None
        return [*found[:1], POSITION, *found[1:]] if learned else found

    def reading(
        self, model: Model, prompts: Prompts, into: tuple[str, ...]
    ) -> Callable[[Batch, int], Reading]:
        """Return a function that makes what a batch's walk keeps."""
        groups = [(source,) for source in self.sources(model)]
        edges = make_edges(model, groups, self.heads, into)
        return prepare_reading(model, prompts, edges, self.keep, Zero())


@dataclass(frozen=True, eq=False)
class ScoreParts(_Parts):
    """The measure behind `score_parts`, with its settings."""

    group = "score_parts"

    pairs: bool = False

    def prepare(self, model: Model, prompts: Prompts) -> MakeRecorder:
        read = self.reading(model, prompts, ("q", "k"))
        sources, rounding = self.sources(model), Rounding.of_proof(model)

        def make(batch: Batch) -> Recorder:
            reading = read(batch, 1)
            places = _Kept(batch, reading)
            return ScorePartsRecorder(self.pairs, reading, places, self.heads, sources, rounding)

        return make

    def names(self, model: Model) -> Mapping[str, Any]:
        found = dict(_Parts.names(self, model))
        return {**found, "key_source": found["source"]} if self.pairs else found


@dataclass(frozen=True, eq=False)
class MarginParts(_Parts):
    """The measure behind `margin_parts`, with its settings."""

    group = "margin_parts"

    def prepare(self, model: Model, prompts: Prompts) -> MakeRecorder:
        read = self.reading(model, prompts, ("v",))
        readouts = Readouts(model, prompts)
        sources, rounding = self.sources(model), Rounding.of_proof(model)

        def make(batch: Batch) -> Recorder:
            reading = read(batch, 1)
            places = _Kept(batch, reading)
            shared = (reading, places, self.heads, sources, rounding)
            return MarginPartsRecorder(batch, readouts.of(batch), *shared)

        return make


class _Kept:
    """Where the kept positions of a batch's prompts are among the columns of its packs.

    Parameters
    ----------
    batch, reading
        The batch, and what its walk keeps.
    """

    def __init__(self, batch: Batch, reading: Reading) -> None:
        n, width = len(batch.rows), batch.width
        prompt = reading.layout.prompt.own[:, 0]
        columns, wanted = reading.places.columns.own[prompt], reading.places.wanted.own[prompt]
        own = columns - width * torch.arange(n)[:, None]
        asked = torch.arange(width).expand(n, -1) if batch.kept is None else batch.kept.own
        same = (own[:, None] == asked[..., None]) & wanted[:, None]
        self.index = Everywhere(same.int().argmax(dim=-1), batch.devices)
        self.there = Everywhere(same.any(dim=-1), batch.devices)
        self.prompt = Everywhere(prompt, batch.devices)

    def of(self, x: Float[torch.Tensor, "G *rest M"]) -> Float[torch.Tensor, "B *rest kept"]:
        """Return values at columns of packs, by prompt at kept positions; NaN where none is."""
        return self.by_prompt(x[self.prompt.on(x.device)])

    def by_prompt(self, x: Float[torch.Tensor, "B *rest M"]) -> Float[torch.Tensor, "B *rest kept"]:
        """Return values at columns, in the order of prompts, at kept positions."""
        shape = (len(x), *[1] * (x.dim() - 2), -1)
        index = self.index.on(x.device).view(shape).expand(*x.shape[:-1], -1)
        there = self.there.on(x.device).view(shape)
        return x.gather(-1, index).masked_fill(~there, torch.nan)


class _PartsRecorder(Recorder):
    """Keeps what sources wrote and heads read, and splits what heads read into parts."""

    def __init__(
        self,
        reading: Reading,
        places: _Kept,
        heads: Sequence[tuple[int, int]],
        sources: Sequence[Source],
        rounding: Rounding | None,
    ) -> None:
        self.reading, self.places, self.heads = reading, places, heads
        self.sources, self.rounding = sources, rounding
        self.claims: list[Claim] = []

    def layer(self, view: LayerView) -> None:
        self.reading.keep(view)

    def passing(self, view: PassingView) -> None:
        self.reading.keep(view)

    def split(
        self, stream: Stream, layer: int, into: str, heads: Sequence[int], n_heads: int
    ) -> dict[str, Float[torch.Tensor, "n G C h d"]]:
        """Return parts of queries, keys or values by heads; the last part is that of the biases.

        "at positions" with rotary embedding, "content" without; values have only "content".
        """
        writes, n = self.reading.writes, self.reading.layout.n_changed
        assert writes is not None
        columns = slice(None, n) if into == "q" else slice(n, None)
        below = [source for source in self.sources if source.layer < layer]
        frozen = _FrozenStream(stream, into)
        whole = stream.x.float()
        found: dict[str, list[torch.Tensor]] = {}
        total = torch.zeros_like(whole)
        for start in range(0, len(below), AT_ONCE):
            some = below[start : start + AT_ONCE]
            parts = writes.parts(some, layer, columns, whole.device)
            total = total + parts.sum(dim=0)
            _extend(found, frozen.parts(parts.to(stream.x.dtype)))
        missing = len(self.sources) - len(below)
        for kept in found.values():
            kept.append(torch.zeros_like(kept[0][:1]).expand(missing, *kept[0].shape[1:]))
        # Biases of lower layers are in the stream; those of this layer come on the way.
        biases = (whole - total).to(stream.x.dtype)
        _extend(found, frozen.parts(biases[None], with_biases=True))
        if self.rounding is not None:
            self._claim(frozen, found, layer)
        per = n_heads // found["content"][0].shape[-2]  # query heads that share one; 1 of queries
        own = [head // per for head in heads]
        return {name: some_heads(torch.cat(parts), own) for name, parts in found.items()}

    def _claim(
        self, frozen: _FrozenStream, found: Mapping[str, list[torch.Tensor]], layer: int
    ) -> None:
        """Claim that the parts sum to the whole."""
        assert self.rounding is not None
        name = "at positions" if "at positions" in found else "content"
        parts = torch.cat(found[name]).float()
        # Of the largest head and position: where all parts vanish, what the whole sums up to 0
        # leaves its rounding.
        size = parts.norm(dim=-1).sum(dim=0).amax(dim=(1, 2), keepdim=True)
        error = (parts.sum(dim=0) - frozen.whole[name].float()).norm(dim=-1)
        error = error / size.clamp(min=torch.finfo(torch.float32).tiny)
        error = error.flatten(1).amax(dim=1)[self.places.prompt.on(error.device)]
        error = error.nan_to_num(nan=torch.inf)
        allowed = torch.full_like(error, self.rounding.module(frozen.stream.x.dtype))
        self.claims.append(Claim("parts", [layer], error[None], allowed[None]))


class _FrozenStream:
    """A stream whose queries, keys or values are linear in it, with frozen norms."""

    def __init__(self, stream: Stream, into: str) -> None:
        self.stream, self.into = stream, into
        self.passing = Pass(stream.architecture)
        self.block = Frozen(stream.block, self.passing)
        self.at = stream.positions.tables(lambda table: table.squeeze(1))
        self.whole = {name: x[0] for name, x in self._pass(stream.x[None]).items()}

    def parts(
        self, x: Float[torch.Tensor, "n G C d_model"], with_biases: bool = False
    ) -> dict[str, Float[torch.Tensor, "n G C heads d"]]:
        """Return the parts of queries, keys or values, at their positions and at distance 0."""
        self.passing.mode = "biases" if with_biases else "part"
        return self._pass(x)

    def _pass(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        stream, block = self.stream, self.block
        normed = stream.architecture.attention_input(block, x)
        found = stream.wiring.project(stream.architecture, block, normed, self.into)
        if self.into == "v":
            return {"content": found}
        query = self.into == "q"
        unturned = Tables(None, None, self.at.factor, None)
        content = stream.architecture.turn(block, found, unturned, query=query)
        if self.at.cos is None:
            return {"content": content}
        turned = stream.architecture.turn(block, found, self.at, query=query)
        return {"content": content, "at positions": turned}


def _extend(found: dict[str, list[torch.Tensor]], more: Mapping[str, torch.Tensor]) -> None:
    for name, parts in more.items():
        found.setdefault(name, []).append(parts)


class ScorePartsRecorder(_PartsRecorder):
    """Records products of the parts of last queries and of keys."""

    group = "score_parts"

    def __init__(self, pairs: bool, *shared: Any) -> None:
        _PartsRecorder.__init__(self, *shared)
        self.pairs = pairs

    def finish(self, end: End) -> dict[str, torch.Tensor]:
        by_head: dict[tuple[int, int], dict[str, torch.Tensor]] = {}
        edges = self.reading.edges
        for layer in edges.layers:
            reads, heads = self.reading.heads[layer], edges.heads_at(layer)
            assert reads.queries is not None
            assert reads.keys is not None
            n_heads, read_at = reads.z.shape[2], edges.read_at(layer, "k")
            query = self.split(reads.queries, layer, "q", heads, n_heads)
            key = self.split(reads.keys, read_at, "k", heads, n_heads)
            for i, head in enumerate(heads):
                found = self._of_head(reads, query, key, i)
                by_head[layer, head] = {k: x.to(end.residual.device) for k, x in found.items()}
        names = by_head[self.heads[0]]
        return {n: torch.stack([by_head[head][n] for head in self.heads], dim=1) for n in names}

    def _of_head(
        self,
        reads: HeadReads,
        query: Mapping[str, torch.Tensor],
        key: Mapping[str, torch.Tensor],
        i: int,
    ) -> dict[str, Float[torch.Tensor, "B *rest kept"]]:
        scale = reads.scale
        found: dict[str, torch.Tensor] = {}
        turned = "at positions" if "at positions" in query else "content"
        for name, suffix in ((turned, ""), ("content", "_content")):
            # (n, G, d) of the last position and (n, G, M, d).
            q, k = query[name][:, :, -1, i].float() * scale, key[name][..., i, :].float()
            if suffix and POSITION in self.sources:
                at = torch.arange(len(q), device=q.device) == self.sources.index(POSITION)
                q, k = q.masked_fill(at.view(-1, 1, 1), 0), k.masked_fill(at.view(-1, 1, 1, 1), 0)
            whole_q, whole_k = q.sum(dim=0), k.sum(dim=0)
            if not suffix:
                found["score"] = torch.einsum("gd,gmd->gm", whole_q, whole_k)
                if self.pairs:
                    found["score_part"] = torch.einsum("agd,bgmd->gabm", q, k)
            found[f"query_part{suffix}"] = torch.einsum("ngd,gmd->gnm", q, whole_k)
            found[f"key_part{suffix}"] = torch.einsum("gd,ngmd->gnm", whole_q, k)
        return {name: self.places.of(x) for name, x in found.items()}


class MarginPartsRecorder(_PartsRecorder):
    """Records label logits of the parts of values, weighted by attention."""

    group = "margin_parts"

    def __init__(self, batch: Batch, readout: Readout, *shared: Any) -> None:
        _PartsRecorder.__init__(self, *shared)
        self.batch, self.readout = batch, readout
        self.spreads: dict[int, torch.Tensor] = {}
        self.weights: dict[int, torch.Tensor] = {}

    def layer(self, view: LayerView) -> None:
        self.reading.keep(view)
        if view.index not in self.reading.edges.layers:
            return
        spread = self.readout.write_spread(view)
        if spread is not None:
            self.spreads[view.index] = spread
        self.weights[view.index] = keep(view.last.weights, self.batch)

    def finish(self, end: End) -> dict[str, torch.Tensor]:
        edges, device = self.reading.edges, end.residual.device
        last = self.readout.spread(end.residual)
        written, parts = {}, {}
        for layer in edges.layers:
            reads, heads = self.reading.heads[layer], edges.heads_at(layer)
            assert reads.keys is not None
            n_heads = reads.z.shape[2]
            values = self.split(reads.keys, edges.read_at(layer, "v"), "v", heads, n_heads)
            own = self.readout.on(reads.z.device)
            directions = own.directions[layer]
            assert directions is not None
            prompt = self.places.prompt.on(reads.z.device)
            of_layer: list[tuple[torch.Tensor, torch.Tensor]] = []
            for i, head in enumerate(heads):
                direction = directions[..., head, :, :]  # (D, label) or (B, D, label)
                direction = direction.expand(len(prompt), -1, -1)
                right = self.batch.gold.on(direction.device)
                gold = above_mean(direction.float(), right)
                if layer in self.spreads:
                    gold = gold / self.spreads[layer][:, None]
                z = reads.z[prompt][:, -1, head].float()
                total = (z * gold).sum(dim=-1)
                if reads.gate is not None:
                    gold = gold * reads.gate[prompt][:, -1, head].float()
                of_value = values["content"][..., i, :].float()[:, prompt]  # (n, B, M, D)
                logits = torch.einsum("nbmd,bd->bnm", of_value, gold)
                kept = self.places.by_prompt(logits) * self.weights[layer][:, head, None]
                of_layer.append((total, kept))
            # In one piece for each layer, from its device.
            totals, every = (torch.stack(x, dim=1).to(device) for x in zip(*of_layer, strict=True))
            for i, head in enumerate(heads):
                written[layer, head] = totals[:, i] / last
                parts[layer, head] = every[:, i] / last.view(-1, *[1] * (every.dim() - 2))
        return {
            "written": torch.stack([written[head] for head in self.heads], dim=1),
            "margin_part": torch.stack([parts[head] for head in self.heads], dim=1),
        }
