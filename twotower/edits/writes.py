"""What the parts of a model wrote to the residual stream in the clean run, and its changes.

Shapes: G packs, C columns (positions) of interest, n groups of sources.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import torch
from jaxtyping import Float, Float32

from ..models import Architecture
from ..models.architecture import call
from ..models.rounding import Rounding
from ..walk.everywhere import Everywhere
from ..walk.views import LayerView, PassingView
from .frozen import frozen_write
from .prepared import BatchChange, Part
from .remainder import at_least_float32, take_out, wide
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
    product
        (G, C, d_model) heads' outputs times this weight; None until it is needed.
    rounding
        (G, C, d_model) `attention_output` less its exact value; None if it is not followed.
    of_all
        (G, C, d_model) what a change of all heads takes away from the output of the projection;
        None until it is needed.
    """

    block: Any
    z: Float[torch.Tensor, "G C H D"] | None = None
    attention_output: Float[torch.Tensor, "G C d_model"] | None = None
    attention_write: Float[torch.Tensor, "G C d_model"] | None = None
    others: dict[str, Float[torch.Tensor, "G C d_model"]] = field(default_factory=dict)
    factor: Float[torch.Tensor, ""] | None = None
    weight: Float[torch.Tensor, "H D d_model"] | None = None
    product: Float[torch.Tensor, "G C d_model"] | None = None
    rounding: Float[torch.Tensor, "G C d_model"] | None = None
    of_all: Float[torch.Tensor, "G C d_model"] | None = None


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
    together
        Whether several sources may be changed together. Then little of the stream may be left, and
        its rounding is followed, as always in a coarse dtype.

    Attributes
    ----------
    rounding
        (G, C, d_model) float32 stream that enters the layer less the exact sum of all writes below;
        None if it is not followed.
    """

    def __init__(
        self,
        architecture: Architecture,
        sources: Sequence[Source],
        index: Everywhere,
        change: BatchChange,
        together: bool = False,
    ) -> None:
        self.architecture, self.index, self.change = architecture, index, change
        self.kinds: dict[int, set[str]] = {}
        for source in sources:
            self.kinds.setdefault(source.layer, set()).add(source.kind)
        self.layers: dict[int, LayerWrites] = {}
        self.together, self.follows = together, together
        self.rounding: Float32[torch.Tensor, "G C d_model"] | None = None
        self.sum: Float[torch.Tensor, "G C d_model"] | None = None
        self.at_layer = -1
        self.latest: dict[tuple[int | None, int | None], tuple[Group, torch.Tensor]] = {}

    def enter(self, view: LayerView | PassingView) -> None:
        """Follow what enters a layer; `keep` does so if it was not done."""
        if view.index == self.at_layer:
            return
        self.at_layer = view.index
        if view.index == 0:
            self.keep_embedding(view)
            self.follows = self.together or Rounding().is_coarse(view.residual.dtype)
        if not self.follows:
            return
        dtype = wide(view.residual.device)
        now = self._at(view.residual).to(dtype)
        if self.sum is None:
            self.sum = now
        self.sum = self.sum.to(now.device)
        if view.index and view.entered is not None:
            self.sum = self.sum + (now - self._at(view.entered).to(now))
        self.rounding = (now - self.sum).float()

    def keep(self, view: LayerView | PassingView) -> None:
        """Keep copies of a layer's writes."""
        self.enter(view)
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
        if self.sum is not None:
            for write in others.values():
                if write is not None:
                    self.sum = self.sum + self._at(write).to(self.sum)
            if isinstance(view, LayerView):
                self.sum = self.sum + self._attention(view, found).to(self.sum)
            self.sum = self.scaled(self.sum, view.index, view.index + 1)

    def _attention(self, view: LayerView, kept: LayerWrites) -> Float[torch.Tensor, "G C d_model"]:
        """Return what attention added, exactly where its heads may be taken out."""
        if kept.z is None:
            return self._at(view.attention_write)
        exact, block = self._product(kept).to(wide(kept.z.device)), kept.block
        nothing = torch.zeros_like(kept.z[:1, 0].flatten(-2))
        exact = exact + call(self.architecture.projection(block), nothing)
        if kept.attention_output is None or kept.attention_write is None:
            written: torch.Tensor = self.architecture.write(block, exact)
            return written
        kept.rounding = (kept.attention_output.to(exact) - exact).float()
        return kept.attention_write

    def _product(self, kept: LayerWrites) -> Float[torch.Tensor, "G C d_model"]:
        assert kept.z is not None
        if kept.product is not None:
            return kept.product
        found = at_least_float32(kept.z).flatten(-2) @ self._weight(kept).flatten(0, 1)
        if self.together:  # it is needed again
            kept.product = found
        return found

    def _weight(self, kept: LayerWrites) -> Float[torch.Tensor, "H D d_model"]:
        assert kept.z is not None
        if kept.weight is None:
            kept.weight = output_weight(self.architecture, kept.block, kept.z)
        return at_least_float32(kept.weight)

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
        """Return what a change of each group takes away from the residual stream.

        It is in float32, or wider if several sources change together. The stream is the one that
        leaves the groups' highest layer, which all groups have in common.

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
        dtype = wide(device) if self.together else torch.float32
        known, lost = self._known(group, columns)
        layer = known[-1].layer + 1 if known else -1
        for source_layer, own in groupby(group[len(known) :], key=lambda source: source.layer):
            lost = None if lost is None else self.scaled(lost.to(device), layer, source_layer)
            layer = source_layer
            for part in self._of_layer(self.layers[layer], list(own), columns):
                part = part.to(device, dtype)
                lost = part if lost is None else lost + part
        assert lost is not None
        lost = lost.to(device) if group == known else self.scaled(lost, layer, layer + 1)
        if self.together:
            self.latest[columns.start, columns.stop] = group, lost
        return lost

    def _known(self, group: Group, columns: slice) -> tuple[Group, torch.Tensor | None]:
        """Return what is lost by the first layers of a group, if that was computed last.

        Targets of neighbouring layers often lose the same sources, and the higher some more.
        """
        known, lost = self.latest.get((columns.start, columns.stop), ((), None))
        n = len(known)
        whole_layers = n == len(group) or (0 < n < len(group) and group[n].layer > known[-1].layer)
        return (known, lost) if whole_layers and group[:n] == known else ((), None)

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
        output = kept.z[:, columns, source.head].float() @ self._weight(kept)[source.head]
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
            yield (at_least_float32(write) - at_least_float32(new))[:, columns]

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
        rounding = None if kept.rounding is None else kept.rounding[:, columns]
        if rounding is not None:
            output = output.to(wide(output.device))
        left = take_out(kept.attention_output[:, columns], rounding, output).to(dtype)
        write: torch.Tensor = at_least_float32(kept.attention_write[:, columns])
        return write - at_least_float32(architecture.write(block, left))

    def _lost_output(
        self, kept: LayerWrites, layer: int, heads: list[int], columns: slice
    ) -> Float[torch.Tensor, "G C d_model"]:
        """Return what a change of heads takes away from the output of the projection."""
        assert kept.z is not None
        weight, new = self._weight(kept), self.change.output(layer, kept.z)
        n_heads = len(weight)
        if 2 * len(heads) > n_heads and kept.of_all is None:
            # Of most heads: that of all heads, which is the same for other targets, less the
            # others'.
            kept.of_all = self._product(kept)
            if new.dim():  # not zeros
                lost = at_least_float32(kept.z - new.expand_as(kept.z))
                kept.of_all = lost.flatten(-2) @ weight.flatten(0, 1)
        z, new = kept.z, new.expand_as(kept.z)

        def of(some: Iterable[int]) -> torch.Tensor:
            # Slices are joined; an index would be copied from the CPU.
            some = list(some)
            lost = (z[:, columns, head] - new[:, columns, head] for head in some)
            parts = torch.cat([*lost], dim=-1)
            return at_least_float32(parts) @ torch.cat([weight[head] for head in some])

        if 2 * len(heads) <= n_heads:
            return of(heads)
        assert kept.of_all is not None
        of_all = kept.of_all[:, columns]
        if len(heads) == n_heads:
            return of_all
        return of_all - of(head for head in range(n_heads) if head not in heads)


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
