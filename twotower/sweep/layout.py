"""Layout of counterfactual rows in a batch, with the mask of what each position sees.

A change at some positions does not affect earlier positions. So a row holds only the *changed*
positions: the first one where heads are changed, and all later ones. Prompts with the same
beginning have the same counterfactual there. Their rows share one *pack*, which holds common
positions once. A position sees the clean, unchanged positions before it in its prompt, and the
changed ones of its own row.

Shapes: G packs, S changed positions of a pack, E unchanged ones, B prompts of T positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Shaped

from ..walk.everywhere import Everywhere


@dataclass
class Layout:
    """Packs of a batch.

    Attributes
    ----------
    source, earlier
        (G, S), (G, E) indices of changed and of unchanged positions in the batch's flattened
        (B T) positions; 0 at padding of a pack.
    visible
        (G, S, E + S) boolean: keys that each changed position may attend to. Padding of a
        pack sees only itself.
    distance
        (G, S, E + S) number of positions from query back to key.
    last
        (G, Q) indices, among the changed positions, of those that are read, such as the prompts'
        last positions; 0 at padding.
    prompt
        (B, R) index of each prompt's read positions in the flattened (G Q) of all.
    causal
        Whether every position sees exactly itself and the positions before it in its pack.
    owner
        (G, S) number of one prompt to which a changed position belongs; -1 at padding.
    depth
        (G, S) number of tokens before a changed position in its prompt; 0 at padding.
    every
        (G, E + S) indices of the unchanged, then of the changed positions.
    """

    source: Everywhere
    earlier: Everywhere
    visible: Everywhere
    distance: Everywhere
    last: Everywhere
    prompt: Everywhere
    causal: bool
    owner: Everywhere
    depth: Everywhere
    every: Everywhere
    _seen: dict[object, torch.Tensor] = field(default_factory=dict)

    @property
    def n_changed(self) -> int:
        """Number of changed positions S of a pack."""
        return int(self.source.own.shape[1])

    def seen(
        self, window: int | None, chunk: int | None, last: bool, device: torch.device
    ) -> Bool[torch.Tensor, "G end all"]:
        """Return (G, S or Q, E + S) boolean: visible keys, for a layer's window or chunks."""
        key = (window, chunk, last, device)
        if key not in self._seen:
            seen = self.visible.on(device)
            if window is not None:
                seen = seen & (self.distance.on(device) < window)
            if chunk is not None:  # a key is in the same chunk if it is not before its beginning
                since = self.depth.on(device)[..., None] % chunk
                seen = seen & (self.distance.on(device) <= since)
            self._seen[key] = self.ends(seen) if last else seen
        return self._seen[key]

    def ends(self, x: Shaped[torch.Tensor, "G S *rest"]) -> Shaped[torch.Tensor, "G Q *rest"]:
        """Return x (G, S, ...) at the positions that are read, (G, Q, ...)."""
        packs = torch.arange(len(x), device=x.device)
        return x[packs[:, None], self.last.on(x.device)]

    def row_ends(
        self, x: Shaped[torch.Tensor, "G n S *rest"]
    ) -> Shaped[torch.Tensor, "G n Q *rest"]:
        """Return rows (G, n, S, ...) at the positions that are read, (G, n, Q, ...)."""
        return self.ends(x.transpose(1, 2)).transpose(1, 2)

    def worst(self, x: Float[torch.Tensor, "G S"]) -> Float[torch.Tensor, " B"]:
        """Return (B,) each prompt's largest value of x (G, S), at least 0."""
        owner = self.owner.on(x.device).flatten()
        prompts = torch.arange(len(self.prompt.own), device=x.device)
        return torch.where(owner == prompts[:, None], x.flatten(), 0).amax(dim=1)

    def by_prompt(
        self, x: Shaped[torch.Tensor, "G n Q *rest"]
    ) -> Shaped[torch.Tensor, "B n R *rest"]:
        """Return x (G, n, Q, ...) at the positions that are read, by prompt (B, n, R, ...)."""
        return self.prompt.take(x.transpose(1, 2)).transpose(1, 2)


@dataclass
class _Pack:
    """Positions of one or more prompts as trees of shared prefixes; common positions once."""

    source: list[int] = field(default_factory=list)
    parent: list[int] = field(default_factory=list)
    depth: list[int] = field(default_factory=list)
    changed: list[bool] = field(default_factory=list)
    children: dict[tuple[int, tuple[int, ...]], int] = field(default_factory=dict)
    read: dict[int, list[int]] = field(default_factory=dict)

    def add(
        self,
        prompt: int,
        keys: list[tuple[int, ...]],
        at: np.ndarray,
        start: int,
        reads: list[int],
    ) -> None:
        """Add a prompt; `start` and `reads` count in the flattened positions and in its own."""
        nodes = []
        node = -1
        for depth, (key, changed) in enumerate(zip(keys, at, strict=True)):
            place = (node, key)
            if place not in self.children:
                self.children[place] = len(self.source)
                self.source.append(start + depth)
                self.parent.append(node)
                self.depth.append(depth)
                self.changed.append(bool(changed) or (node >= 0 and self.changed[node]))
            node = self.children[place]
            nodes.append(node)
        self.read[prompt] = [nodes[depth] for depth in reads]
        for node in self.read[prompt]:  # rows hold what is read, even if nothing changes there
            self.changed[node] = True

    @property
    def cost(self) -> int:
        return sum(self.changed)


def make_layout(
    token_id: Int[np.ndarray, "B T"],
    at: Bool[np.ndarray, "B T"],
    kinds: Int[np.ndarray, "B T"],
    width: float,
    devices: Sequence[torch.device],
    separate: bool = False,
    reads: Int[np.ndarray, "B R"] | None = None,
) -> Layout:
    """Return the packs of a batch; prompts with the same beginning may share a pack.

    Parameters
    ----------
    token_id
        (B, T) token ids, -1 at padding.
    at
        (B, T) boolean: positions at which heads are changed.
    kinds
        (B, T) number of the new output at each position; positions with different numbers are
        not shared.
    width
        Number of positions at which attention costs as much as the rest of a block. Decides
        whether sharing a beginning pays for the larger pack.
    devices
        Devices that need the tensors.
    separate
        Whether each prompt has its own pack, as a mixer of positions needs it.
    reads
        (B, R) columns of the positions that are read; by default the last.
    """
    n, n_positions = token_id.shape
    if reads is None:
        reads = np.full((n, 1), n_positions - 1)
    rows: list[tuple[list[tuple[int, ...]], np.ndarray, int, list[int]]] = []
    for b in range(n):
        start = int((token_id[b] < 0).sum())
        what = np.where(at[b], kinds[b], -1)[start:]
        keys: list[tuple[int, ...]] = [
            (int(t), int(k)) for t, k in zip(token_id[b, start:], what, strict=True)
        ]
        own = (reads[b] - start).tolist()
        rows.append((keys, at[b, start:], b * n_positions + start, own))
    packs: list[_Pack] = []
    for b in sorted(range(n), key=lambda b: rows[b][0]):
        alone = _Pack()
        alone.add(b, *rows[b])
        if packs and not separate:
            joint = _copy(packs[-1])
            joint.add(b, *rows[b])
            if _price(joint, width) < _price(packs[-1], width) + _price(alone, width):
                packs[-1] = joint
                continue
        packs.append(alone)
    return _tensors(packs, reads.shape, n_positions, devices)


def _price(pack: _Pack, width: float) -> float:
    """Return the cost of the pack's rows; the unit is one position of a block without attention."""
    return pack.cost * (1 + len(pack.source) / width)


def _copy(pack: _Pack) -> _Pack:
    return _Pack(
        list(pack.source),
        list(pack.parent),
        list(pack.depth),
        list(pack.changed),
        dict(pack.children),
        dict(pack.read),
    )


def _read(pack: _Pack) -> list[int]:
    """Return the different nodes of a pack that are read, in the order of its prompts."""
    return list(dict.fromkeys(node for nodes in pack.read.values() for node in nodes))


def _tensors(
    packs: list[_Pack], shape: tuple[int, ...], n_positions: int, devices: Sequence[torch.device]
) -> Layout:
    changed = [np.flatnonzero(pack.changed) for pack in packs]
    earlier = [np.flatnonzero(~np.array(pack.changed)) for pack in packs]
    n_changed, n_earlier = max(map(len, changed)), max(map(len, earlier))
    n_read = max(len(_read(pack)) for pack in packs)
    size = (len(packs), n_changed, n_earlier + n_changed)
    source = np.zeros(size[:2], dtype=np.int64)
    owner = np.full(size[:2], -1, dtype=np.int64)
    depths = np.zeros(size[:2], dtype=np.int64)
    before = np.zeros((len(packs), n_earlier), dtype=np.int64)
    visible, distance = np.zeros(size, dtype=bool), np.zeros(size, dtype=np.int64)
    visible[:, np.arange(n_changed), n_earlier + np.arange(n_changed)] = True
    last, prompt = np.zeros((len(packs), n_read), dtype=np.int64), np.zeros(shape, dtype=np.int64)
    for g, (pack, own, old) in enumerate(zip(packs, changed, earlier, strict=True)):
        source[g, : len(own)] = np.array(pack.source)[own]
        owner[g, : len(own)] = source[g, : len(own)] // n_positions
        before[g, : len(old)] = np.array(pack.source)[old]
        ancestors = np.eye(len(pack.source), dtype=bool)
        for node, parent in enumerate(pack.parent):
            if parent >= 0:
                ancestors[node] |= ancestors[parent]
        depth = np.array(pack.depth)
        depths[g, : len(own)] = depth[own]
        for part, columns in ((old, 0), (own, n_earlier)):
            to = slice(columns, columns + len(part))
            visible[g, : len(own), to] = ancestors[np.ix_(own, part)]
            distance[g, : len(own), to] = depth[own][:, None] - depth[part]
        place = {int(node): i for i, node in enumerate(own)}
        numbers = {node: q for q, node in enumerate(_read(pack))}
        for node, q in numbers.items():
            last[g, q] = place[node]
        for b, nodes in pack.read.items():
            prompt[b] = [g * n_read + numbers[node] for node in nodes]
    causal = n_earlier == 0 and bool((visible == np.tri(n_changed, dtype=bool)).all())

    def on(array: np.ndarray) -> Everywhere:
        return Everywhere(array, devices)

    places = (on(source), on(before), on(visible), on(distance), on(last), on(prompt))
    every = np.concatenate((before, source), axis=1)
    return Layout(*places, causal, on(owner), on(depths), on(every))
