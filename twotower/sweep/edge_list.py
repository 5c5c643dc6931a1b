"""A list of edges: which sources lead into which heads' queries, keys and values."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..edits.sources import Group
from ..walk.once import once


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
    def together(self) -> bool:
        """Whether several sources are changed together."""
        return any(len(group) > 1 for group in self.sources)

    @once
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

    @once
    def exist(self) -> np.ndarray:
        """(source, target, into) boolean: whether the source is below what the target reads."""
        found = np.zeros((len(self.sources), len(self.targets), len(self.into)), dtype=bool)
        found.flat[[place for *_, place in self.listed]] = True
        return found

    @once
    def listed(self) -> list[tuple[int, int, int, int]]:
        """(layer, source, head, place) of every edge, in the order of rows.

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
