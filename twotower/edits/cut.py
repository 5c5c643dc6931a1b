"""Cutting edges: heads read a residual stream from which some sources' writes are taken out.

Unlike the rows of a sweep, all cuts act in one run: a source's write is the one of this run, in
which lower heads may have changed already. A target's output changes by the difference between what
it computes from the changed and from the unchanged stream, so a cut without effect changes nothing.

Shapes: B prompts of T positions, of which the last n are outputs; h targets of a layer.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Float32

from ..checks import one_of
from ..errors import InputError
from ..head import Head, as_head, check_heads, parse_head
from ..models.positions import Positions as Tables
from ..prompts.positions import position_mask
from ..walk.batch import Batch
from ..walk.everywhere import Everywhere
from ..walk.recorder import BatchEdit
from ..walk.scores import attention, scores
from ..walk.views import LayerView, PassingView
from .edits import CutEdges
from .prepared import BatchChange, prepare_change
from .remainder import at_least_float32, take_out
from .sources import Group, Source, all_sources, as_sources
from .wiring import INTO, get_wiring
from .writes import Writes, parts_of

if TYPE_CHECKING:
    from ..models import Architecture, Model
    from ..prompts import Prompts

ANSWER = "answer"
"""Name of the target that is the answer itself, and of the tower of edges into it."""

Cuts = dict[str, list[tuple[Group, list[int]]]]
"""Sources to cut, and the heads of a layer that lose them, by what of the heads reads."""


def all_edges(model: Model) -> list[tuple[Source, Head | str, str]]:
    """Return every edge from a source into a head, and from a head into the answer."""
    known, architecture = all_sources(model), model.architecture
    found: list[tuple[Source, Head | str, str]] = [
        (source, head, into)
        for head in model.heads
        for into in INTO
        for source in known
        if source.layer < _read_at(architecture, head.layer, into)
    ]
    return found + [(source, ANSWER, ANSWER) for source in known if source.kind == "head"]


class PreparedCut:
    """Cut edges, checked against a model and prompts.

    Raises
    ------
    InputError
        If a source or target does not exist, a source is not below its target, or an edge is given
        twice.
    """

    def __init__(self, model: Model, prompts: Prompts, edit: CutEdges) -> None:
        self.model = model
        self.outputs = position_mask(prompts, edit.outputs, "outputs")
        self.at = position_mask(prompts, edit.positions)
        self.answer, self.layers = _listed(model, edit.edges)
        cuts = [
            cut for by_tower in self.layers.values() for own in by_tower.values() for cut in own
        ]
        groups = [self.answer, *(group for group, _ in cuts)]
        self.sources = sorted({source for group in groups for source in group})
        self.together = any(len(group) > 1 for group in groups)
        others = {source.kind for source in self.sources} - {"head"}
        self.change = prepare_change(edit.to, model, prompts, self.at | self.outputs, others)
        self.wiring = get_wiring(model)

    def of(self, towers: str) -> list[Head]:
        """Return the targets that are read through some of "q", "k" and "v"."""
        return sorted(
            {
                Head(layer, head)
                for layer, cuts in self.layers.items()
                for into in towers
                for _, heads in cuts.get(into, [])
                for head in heads
            }
        )

    def for_batch(self, batch: Batch) -> Cut:
        """Return the edit of a batch."""
        outputs = batch.part(self.outputs)
        first = outputs.any(axis=0)
        n = batch.width - int(first.argmax()) if first.any() else 0
        columns = torch.arange(outputs.size).view(outputs.shape)
        index = Everywhere(columns, batch.devices)
        change = self.change.for_batch(batch, parts_of(self.sources))
        masks = (batch.cut(self.outputs), batch.cut(self.at))
        return Cut(self, self.model.architecture, n, *masks, index, change)


def _listed(model: Model, edges: Sequence[tuple[Any, Any, str]]) -> tuple[Group, dict[int, Cuts]]:
    """Return the sources to cut from the answer, and the cuts of each layer."""
    names: dict[str, Source] = {}
    targets: dict[str, Head | None] = {}
    by_target: dict[tuple[Head | None, str], set[Source]] = {}
    for given, target, into in edges:
        if repr(given) not in names:
            (group,) = as_sources(model, [given])
            if len(group) > 1:
                raise InputError(f"{given!r} must be one source; write an edge for each")
            names[repr(given)] = group[0]
        if repr(target) not in targets:
            answer = isinstance(target, str) and target == ANSWER
            targets[repr(target)] = None if answer else _head(model, target)
        source, head = names[repr(given)], targets[repr(target)]
        one_of("into", into, (ANSWER,) if head is None else INTO)
        if head is not None and source.layer >= _read_at(model.architecture, head.layer, into):
            raise InputError(
                f"the source {source} is not below what {into} of the target {head} reads; a "
                "source must be in a lower layer than its target"
            )
        own = by_target.setdefault((head, into), set())
        if source in own:
            raise InputError(f"the edge from {source} into {into} of {target} is given twice")
        own.add(source)
    of_answer = tuple(sorted(by_target.pop((None, ANSWER), set())))
    layers: dict[int, Cuts] = {}
    alike: dict[tuple[int, str, Group], list[int]] = {}
    for (head, into), sources in by_target.items():
        assert head is not None
        alike.setdefault((head.layer, into, tuple(sorted(sources))), []).append(head.head)
    for (layer, into, group), heads in alike.items():
        layers.setdefault(layer, {}).setdefault(into, []).append((group, sorted(heads)))
    return of_answer, layers


def _head(model: Model, target: Any) -> Head:
    head = parse_head(target) if isinstance(target, str) else as_head(target)
    (found,) = check_heads([head], model)
    return found


def _read_at(architecture: Architecture, layer: int, into: str) -> int:
    """Return the layer whose residual stream a layer's queries, keys or values read."""
    return layer if into == "q" else architecture.keys_of(layer)


@dataclass
class Read:
    """A layer's input: its residual stream and this stream's rounding, its block and its tables."""

    residual: Float[torch.Tensor, "B T d_model"]
    rounding: Float[torch.Tensor, "B T d_model"] | None
    block: Any
    tables: Tables


class Cut(BatchEdit):
    """Edit of a batch that cuts edges.

    Parameters
    ----------
    prepared
        The edges.
    architecture
        Adapter of the model.
    n
        Number of last positions that contain all positions of outputs.
    outputs, at
        (B, T) boolean: positions of outputs and queries, and those of keys and values.
    index
        (B, T) index of all positions into the batch's flattened positions.
    change
        Change of the sources' outputs.
    """

    def __init__(
        self,
        prepared: PreparedCut,
        architecture: Architecture,
        n: int,
        outputs: Everywhere,
        at: Everywhere,
        index: Everywhere,
        change: BatchChange,
    ) -> None:
        self.layers, self.answer, self.wiring = prepared.layers, prepared.answer, prepared.wiring
        self.architecture, self.n, self.outputs, self.at = architecture, n, outputs, at
        self.donors = change.donors
        self.writes = Writes(architecture, prepared.sources, index, change, prepared.together)
        keys_of = {layer: architecture.keys_of(layer) for layer in self.layers}
        self.shared = {source for layer, source in keys_of.items() if source != layer}
        self.reads: dict[int, Read] = {}

    def leave(self, view: LayerView | PassingView) -> None:
        self.writes.keep(view)
        if view.index in self.shared and isinstance(view, LayerView):
            self.reads[view.index] = self._read(view)

    def enter(
        self, layer: int, residual: Float[torch.Tensor, "B S d_model"], last: bool = False
    ) -> Float[torch.Tensor, "B S d_model"]:
        if layer != self.architecture.n_layers or not self.answer or not self.n:
            return residual
        lost = self._lost(self.answer, layer, self.outputs, residual.device, slice(None))
        return take_out(residual, None, lost).to(residual.dtype)

    def apply(
        self, view: LayerView, z: Float[torch.Tensor, "B T H D"]
    ) -> Float[torch.Tensor, "B T H D"]:
        self.writes.enter(view)
        cuts = self.layers.get(view.index)
        if not cuts or not self.n:
            return z
        heads = sorted({head for own in cuts.values() for _, some in own for head in some})
        self.reads[view.index] = self._read(view)
        exact, after = (self._output(self._heads(view, heads, own)) for own in ({}, cuts))
        if view.gate is not None:
            gate = torch.stack([view.gate[:, -self.n :, h] for h in heads], dim=1)
            exact, after = exact * gate, after * gate
        here = self.outputs.on(z.device)[:, -self.n :, None]
        out = z.clone()
        for number, head in enumerate(heads):
            own = at_least_float32(view.own_z[:, -self.n :, head])
            rounding = own - exact[:, number]
            lost = (exact[:, number] - after[:, number]).to(own)
            changed = out[:, -self.n :, head] + (take_out(own, rounding, lost) - own) * here
            out[:, -self.n :, head] = changed.to(z.dtype)
        if view.index not in self.shared:
            del self.reads[view.index]
        return out

    def _read(self, view: LayerView) -> Read:
        return Read(view.residual, self.writes.rounding, view.block, view.positions)

    def _output(self, view: LayerView) -> Float32[torch.Tensor, "B h n D"]:
        """Return the heads' outputs, before gates."""
        weights = attention(view, scores(view, self.n))
        found: torch.Tensor = weights @ view.value.float().transpose(1, 2)
        return found

    def _heads(self, view: LayerView, heads: list[int], cuts: Cuts) -> LayerView:
        """Return a view of some heads, each with keys and values of its own, after cuts."""
        architecture, positions, z = self.architecture, view.positions, view.z
        query, key, value = (self._part(view, into, heads, cuts.get(into, [])) for into in INTO)
        if positions.bias is not None:
            bias = torch.stack([positions.bias[:, head] for head in heads], dim=1)
            positions = replace(positions, bias=bias)
        sinks = view.sinks
        if sinks is not None:
            sinks = torch.stack([sinks[head] for head in heads])
        own = torch.stack([z[:, :, head] for head in heads], dim=2)
        found = replace(
            view,
            query=query,
            key=key,
            value=value,
            positions=positions,
            z=own,
            own_z=own,
            gate=None,
            sinks=sinks,
        )
        source = architecture.keys_of(view.index)
        if source != view.index:  # with the rotary embedding of their own layer
            read = self.reads[source]
            turned = architecture.turn(read.block, key, read.tables, query=False)
            found.last.__dict__["_turned_key"] = turned
        return found

    def _part(
        self,
        view: LayerView,
        into: str,
        heads: list[int],
        cuts: Sequence[tuple[Group, Collection[int]]],
    ) -> Float[torch.Tensor, "B T h d"]:
        """Return queries, keys or values of some heads, after cuts."""
        whole = {"q": view.query, "k": view.key, "v": view.value}[into]
        n_heads, width = view.z.shape[2], whole.shape[1]

        def of(x: Float[torch.Tensor, "B S K d"], head: int) -> Float[torch.Tensor, "B S d"]:
            return x[:, :, head * x.shape[2] // n_heads]

        found = {head: of(whole, head) for head in heads}
        at = _read_at(self.architecture, view.index, into)
        mask = self.outputs if into == "q" else self.at
        rows = slice(width - self.n, None) if into == "q" else slice(None)
        for group, own in cuts:
            read = self.reads[at]
            stream = read.residual[:, rows]
            rounding = None if read.rounding is None else read.rounding[:, rows]
            lost = self._lost(group, at, mask, stream.device, rows)
            changed = take_out(stream, rounding, lost).to(stream.dtype)
            normed = self.architecture.attention_input(read.block, changed)
            new = self.wiring[at].project(self.architecture, read.block, normed, into)
            new = new.to(whole.device)
            for head in own:
                found[head] = torch.cat((found[head][:, : width - new.shape[1]], of(new, head)), 1)
        return torch.stack([found[head] for head in heads], dim=2)

    def _lost(
        self, group: Group, layer: int, mask: Everywhere, device: torch.device, rows: slice
    ) -> Float[torch.Tensor, "B S d_model"]:
        """Return what a group's change takes out of the stream that enters a layer."""
        lost = self.writes.lost(group, rows, device)
        lost = self.writes.scaled(lost, group[-1].layer + 1, layer)
        return lost * mask.on(device)[:, rows, None]
