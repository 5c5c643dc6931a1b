"""What the parts of a model wrote to the residual stream in the clean run, and its changes.

Shapes: G packs, C columns (positions) of interest, n groups of sources.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import torch
from jaxtyping import Float

from ..models import Architecture
from ..models.architecture import call
from ..walk.everywhere import Everywhere
from ..walk.walk import LayerView, PassingView
from .frozen import frozen_write
from .prepared import BatchChange, Part
from .sources import Group, Source


@dataclass
class LayerWrites:
    """What the parts of one layer wrote, at the columns.

    Attributes
    ----------
    z
        (G, C, H, D) heads' outputs; None without heads.
    attention_output, attention_write
        (G, C, d_model) output of the projection, and what attention adds to the residual stream;
        None without heads.
    others
        (G, C, d_model) what the other parts add, by kind of source.
    factor
        Factor on the residual stream that leaves the layer; None without.
    weight
        (H, D, d_model) weight of the output projection; None until it is needed.
    of_all
        (G, some columns, d_model) what a change of all heads takes away from the output of the
        projection, by first and last column.
    """

    block: Any
    z: Float[torch.Tensor, "G C H D"] | None = None
    attention_output: Float[torch.Tensor, "G C d_model"] | None = None
    attention_write: Float[torch.Tensor, "G C d_model"] | None = None
    others: dict[str, Float[torch.Tensor, "G C d_model"]] = field(default_factory=dict)
    factor: Float[torch.Tensor, ""] | None = None
    weight: Float[torch.Tensor, "H D d_model"] | None = None
    of_all: dict[Any, Float[torch.Tensor, "G some d_model"]] = field(default_factory=dict)


class Writes:
    """The writes of all sources in the clean run, and how a change of sources changes the stream.

    Parameters
    ----------
    architecture
        Adapter of the model.
    sources
        Sources whose writes to keep.
    index
        (G, C) index of the columns in the batch's flattened (B T) positions.
    change
        Change of the sources' outputs at the columns.
    """

    def __init__(
        self,
        architecture: Architecture,
        sources: Sequence[Source],
        index: Everywhere,
        change: BatchChange,
    ) -> None:
        self.architecture, self.index, self.change = architecture, index, change
        self.kinds: dict[int, set[str]] = {}
        for source in sources:
            self.kinds.setdefault(source.layer, set()).add(source.kind)
        self.layers: dict[int, LayerWrites] = {}

    def keep(self, view: LayerView | PassingView) -> None:
        """Keep copies of a layer's writes."""
        self.keep_embedding(view)
        kinds = self.kinds.get(view.index, set())
        found = self.layers[view.index] = LayerWrites(view.block)
        found.factor = self.architecture.stream_factor(view.block)
        if "head" in kinds:
            assert isinstance(view, LayerView)
            found.z = self._at(view.z)
            assert view.attention_write is not None
            if self.architecture.attention_post_norm(view.block) is not None:
                found.attention_output = self._at(view.attention_output)
                found.attention_write = self._at(view.attention_write)
        others = {"mlp": view.mlp_write, "mixer": view.mixer_write}
        if isinstance(view, LayerView):
            others["extra"] = view.more_write
        for kind in kinds & others.keys():
            found.others[kind] = self._at(others[kind])

    def keep_embedding(self, view: LayerView | PassingView) -> None:
        """Keep a copy of what enters the first layer."""
        if view.index == 0 and -1 in self.kinds and -1 not in self.layers:
            self.layers[-1] = LayerWrites(None, others=self._embeddings(view))

    def _embeddings(self, view: LayerView | PassingView) -> dict[str, torch.Tensor]:
        """Return what enters the first layer, perhaps without the position embedding, and that."""
        whole = self._at(view.residual)
        if "position" not in self.kinds[-1]:
            return {"embedding": whole}
        assert isinstance(view, LayerView)
        assert view.learned is not None
        learned = view.learned.on(view.residual.device).expand_as(view.residual)
        position = self._at(learned)
        return {"embedding": whole - position, "position": position}

    def _at(self, x: torch.Tensor | None) -> torch.Tensor:
        assert x is not None
        return self.index.take(x)

    def changed(
        self, groups: Sequence[Group], columns: slice, device: torch.device
    ) -> Float[torch.Tensor, "G n C d_model"]:
        """Return what a change of each group takes away from the residual stream, in float32.

        The stream is the one that leaves the groups' highest layer. All groups have the same.

        Parameters
        ----------
        groups
            Groups of sources.
        columns
            Which of the columns.
        device
            Device of the result.
        """
        parts = [self.lost(group, columns, device) for group in groups]
        return torch.stack(parts, dim=1)

    def lost(
        self, group: Group, columns: slice, device: torch.device
    ) -> Float[torch.Tensor, "G C d_model"]:
        """Return what a change of one group takes away from the residual stream (`changed`)."""
        lost: torch.Tensor | float = 0.0
        layer = -1
        for source_layer, own in groupby(group, key=lambda source: source.layer):
            lost = self.scaled(lost, layer, source_layer) if torch.is_tensor(lost) else lost
            layer = source_layer
            for part in self._of_layer(self.layers[layer], list(own), columns):
                lost = lost + part.to(device).float()
        assert isinstance(lost, torch.Tensor)
        return self.scaled(lost, layer, layer + 1)

    def parts(
        self, sources: Sequence[Source], layer: int, columns: slice, device: torch.device
    ) -> Float[torch.Tensor, "n G C d_model"]:
        """Return what sources below a layer wrote to the stream that enters it, in float32.

        Norms between heads and the stream have their own statistic ("frozen"), so that the writes
        of all heads, and biases, sum to what attention added.
        """
        found = []
        for source in sources:
            kept = self.layers[source.layer]
            if source.kind != "head":
                write = kept.others[source.kind][:, columns].float()
            else:
                write = self._frozen(kept, source, columns).float()
            write = self.scaled(write.to(device), source.layer, layer)
            found.append(write)
        return torch.stack(found)

    def _frozen(
        self, kept: LayerWrites, source: Source, columns: slice
    ) -> Float[torch.Tensor, "G C d_model"]:
        assert kept.z is not None
        architecture, block = self.architecture, kept.block
        if kept.weight is None:
            kept.weight = output_weight(architecture, block, kept.z)
        output = kept.z[:, columns, source.head].float() @ kept.weight[source.head].float()
        norm = architecture.attention_post_norm(block)
        if norm is None or kept.attention_output is None:
            written: torch.Tensor = architecture.write(block, output)
            return written
        whole = kept.attention_output[:, columns]
        epsilon = architecture.epsilon(norm)
        normed = frozen_write(norm, output[None], whole, epsilon)[0]
        return normed * architecture.write_multiplier(source.layer)

    def scaled(self, x: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        """Return x times the factors on the stream of the layers from `start` to before `stop`."""
        for layer in range(max(start, 0), stop):
            factor = self.layers[layer].factor
            x = x if factor is None else x * factor.to(x.device)
        return x

    def _of_layer(
        self, kept: LayerWrites, sources: list[Source], columns: slice
    ) -> Iterator[Float[torch.Tensor, "G C d_model"]]:
        heads = [source.head for source in sources if source.kind == "head"]
        if heads:
            yield self._of_heads(kept, sources[0].layer, heads, columns)
        for source in sources:
            if source.kind == "head":
                continue
            write = kept.others[source.kind]
            new = self.change.output((source.kind, source.layer), write)
            yield (write.float() - new.float())[:, columns]

    def _of_heads(
        self, kept: LayerWrites, layer: int, heads: list[int], columns: slice
    ) -> Float[torch.Tensor, "G C d_model"]:
        assert kept.z is not None
        architecture, block = self.architecture, kept.block
        output = self._lost_output(kept, layer, heads, columns)
        dtype = kept.z.dtype
        if kept.attention_output is None or kept.attention_write is None:
            written: torch.Tensor = architecture.write(block, output)
            return written
        # The norm after attention is called on its changed input; nothing is frozen.
        left = (kept.attention_output[:, columns].float() - output).to(dtype)
        lost_write: torch.Tensor = kept.attention_write[:, columns].float()
        return lost_write - architecture.write(block, left).float()

    def _lost_output(
        self, kept: LayerWrites, layer: int, heads: list[int], columns: slice
    ) -> Float[torch.Tensor, "G C d_model"]:
        """Return what a change of heads takes away from the output of the projection."""
        assert kept.z is not None
        if kept.weight is None:
            kept.weight = output_weight(self.architecture, kept.block, kept.z)
        weight: torch.Tensor = kept.weight.float()
        n_heads = len(weight)
        new = self.change.output(layer, kept.z).expand_as(kept.z)
        lost = (kept.z - new)[:, columns].float()
        if 2 * len(heads) <= n_heads:
            return _sum(lost[:, :, head] @ weight[head] for head in heads)
        # Of most heads: that of all heads, which is the same for other targets, less the others'.
        key = (columns.start, columns.stop)
        if key not in kept.of_all:
            kept.of_all[key] = lost.flatten(-2) @ weight.flatten(0, 1)
        others = (lost[:, :, head] @ weight[head] for head in range(n_heads) if head not in heads)
        return kept.of_all[key] - _sum(others) if len(heads) < n_heads else kept.of_all[key]


def _sum(tensors: Iterable[torch.Tensor]) -> torch.Tensor:
    return functools.reduce(torch.add, tensors)


def parts_of(sources: Iterable[Source]) -> list[Part]:
    """Return the parts that change: layers of heads, and others by kind and layer."""
    found: dict[Part, None] = {}
    for source in sorted(sources):
        head = source.kind == "head"
        found[source.layer if head else (source.kind, source.layer)] = None
    return list(found)


def output_weight(
    architecture: Architecture, block: Any, z: Float[torch.Tensor, "G C H D"]
) -> Float[torch.Tensor, "H D d_model"]:
    """Return the output projection's weight by head, from calls on unit vectors."""
    n_heads, size = z.shape[-2:]
    projection = architecture.projection(block)
    eye = torch.eye(n_heads * size, dtype=z.dtype, device=z.device)
    weight = call(projection, eye) - call(projection, torch.zeros_like(eye[:1]))
    by_head: torch.Tensor = weight.unflatten(0, (n_heads, size))
    return by_head
