"""Counterfactual rows: residual streams of runs in which heads are changed.

A row is the residual stream of a pack's changed positions (see `layout`) in one counterfactual
run (see `counterfactuals`). It branches off at the layer of its heads and passes through the
blocks above. Its queries attend to the clean keys and values of the unchanged positions and to
those of the row itself. Each row is exact: it equals a separate forward with the heads changed.
If only the last position is changed, a row is one vector, and one walk sweeps all heads for
about the cost of one more forward.

Shapes: G packs of S changed positions, n rows, H heads on K key-value heads, D = d_head.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Float32

from ..edits.prepared import BatchChange
from ..models import Architecture
from ..models.architecture import call
from ..models.positions import Positions
from ..walk.everywhere import Everywhere
from ..walk.memory import FEW
from ..walk.views import LayerView, PassingView
from .at_index import bias_at, tables_at
from .attend import Scoring, attend_few, attend_many
from .counterfactuals import Step
from .layout import Layout
from .mixers import RowMixer


@dataclass
class Moves:
    """A plan's step as tensors, made before the walk so that the walk need not wait for copies.

    Attributes
    ----------
    n_before, n_kept, n_new
        Numbers of rows that enter the layer, that continue, and that branch off.
    kept
        (n_kept,) indices of the rows that continue; None for all.
    parents
        (n_new,) parents of the rows that branch off: 0 is the clean run, i + 1 is row i. None
        if all branch off the clean run.
    swap
        (n_new, H) boolean: heads changed in each row.
    """

    n_before: int
    n_kept: int
    n_new: int
    kept: Everywhere | None
    parents: Everywhere | None
    swap: Everywhere

    @classmethod
    def of(cls, step: Step, device: torch.device, n_heads: int) -> Moves:
        """Return the tensors of a step, on the device of its layer."""
        swap = torch.zeros(len(step.heads), n_heads, dtype=torch.bool)
        for row, numbers in enumerate(step.heads):
            for number in numbers:
                swap[row, number] = True
        kept, parents = torch.tensor(step.kept), torch.tensor(step.parents) + 1
        every, clean = len(step.kept) == step.n_before, not parents.any()
        return cls(
            step.n_before,
            len(step.kept),
            len(step.parents),
            None if every else Everywhere(kept, [device]),
            None if clean else Everywhere(parents, [device]),
            Everywhere(swap, [device]),
        )

    def going_on(
        self, rows: Float[torch.Tensor, "G n_before *rest"]
    ) -> Float[torch.Tensor, "G n_kept *rest"]:
        """Return the rows that continue (G, n_kept, ...), from rows (G, n_before, ...)."""
        return rows if self.kept is None else rows[:, self.kept.on(rows.device)]

    def branching(
        self,
        clean: Float[torch.Tensor, " G *rest"],
        rows: Float[torch.Tensor, "G n_before *rest"] | None,
    ) -> Float[torch.Tensor, "G n_new *rest"]:
        """Return the parents' values (G, n_new or 1, ...), from the clean run (G, ...) and rows."""
        if self.parents is None:
            return clean[:, None]
        assert rows is not None
        both = torch.cat((clean[:, None], rows), dim=1)
        return both[:, self.parents.on(both.device)]


@runtime_checkable
class Replaces(Protocol):
    """What gives rows that branch off new outputs of their heads."""

    change: BatchChange

    def apply(
        self,
        z: Float[torch.Tensor, "G n_or_1 end H D"],
        swap: Everywhere,
        layer: int,
        last: Layout | None,
    ) -> Float[torch.Tensor, "G n end H D"]:
        """Return z (G, n, S, H, D) with each row's heads changed, from (G, n or 1, S, H, D)."""


@dataclass
class RowChange:
    """Change of heads' outputs in rows.

    Attributes
    ----------
    at
        (G, S) boolean: positions at which heads are changed.
    change
        New outputs at the positions (G, S).
    """

    at: Everywhere
    change: BatchChange

    def apply(
        self,
        z: Float[torch.Tensor, "G n_or_1 end H D"],
        swap: Everywhere,
        layer: int,
        last: Layout | None,
    ) -> Float[torch.Tensor, "G n end H D"]:
        """Return z (G, n, S, H, D) with each row's heads changed, from (G, n or 1, S, H, D)."""
        device = z.device
        at = self.at.on(device)
        at = at if last is None else last.ends(at)
        chosen = at[:, None, :, None, None] & swap.on(device)[None, :, None, :, None]
        new = self.change.output(layer, z)
        if self.change.replacements is not None:  # (G, S, H, D), the same in every row
            new = (new if last is None else last.ends(new))[:, None]
        return torch.where(chosen, new, z)


KeysValues = tuple[torch.Tensor, torch.Tensor]
"""Keys after rotary, and values."""


@dataclass
class CleanHeads:
    """Tensors of a layer's heads in the clean run that rows need.

    Attributes
    ----------
    z
        (G, S, H, D).
    key, value
        (G, E, K, ...) of the unchanged positions, keys after rotary.
    positions
        Rotary tables and factors (G, 1, S, ...) of the changed positions.
    bias
        (G, H, E + S) added to the scores for each key; None without.
    sinks
        (H,) scores of the heads' sinks; None without.
    score
        (B,) largest absolute QK score of each prompt's last position at a visible key.
    own
        Keys and values (G, S, K, ...) of the changed positions, if later layers use them.
    """

    z: Float[torch.Tensor, "G end H D"]
    key: Float[torch.Tensor, "G E K d_key"]
    value: Float[torch.Tensor, "G E K D"]
    positions: Positions
    bias: Float[torch.Tensor, "G H all"] | None
    sinks: Float[torch.Tensor, " H"] | None
    score: Float32[torch.Tensor, " B"]
    own: KeysValues | None = None

    @classmethod
    def of(cls, view: LayerView, layout: Layout) -> CleanHeads:
        """Return copies of the tensors in a layer's view that rows need."""
        source, earlier = layout.source, layout.earlier
        own = None
        if view.index in view.architecture.shared_keys:
            own = (source.take(view.turned_key), source.take(view.value))
        return cls(
            source.take(view.z),
            earlier.take(view.turned_key),
            earlier.take(view.value),
            tables_at(view, source),
            bias_at(view, layout.every),
            view.sinks,
            view.last.score_size.amax(dim=-1),
            own,
        )


@dataclass
class Clean:
    """Tensors of one layer of the clean run that rows need.

    Attributes
    ----------
    residual, mlp_write
        (G, S, d_model); the latter only if the block is parallel.
    size
        (G, S) sum of the norms of the residual stream and of what is added to it.
    heads
        Of the heads; None in a layer without.
    mixer_write
        (G, S, d_model) what the layer's mixer adds to the residual stream; None without.
    mixer
        The mixer for rows that enter the layer; None without.
    more
        (G, S, ...) what the end of the block reads besides the stream; None without.
    """

    architecture: Architecture
    index: int
    block: Any
    residual: Float[torch.Tensor, "G end d_model"]
    mlp_write: Float[torch.Tensor, "G end d_model"] | None
    size: Float32[torch.Tensor, "G S"]
    heads: CleanHeads | None
    mixer_write: Float[torch.Tensor, "G end d_model"] | None
    mixer: RowMixer | None
    more: Float[torch.Tensor, "G end *features"] | None = None

    @classmethod
    def of(cls, view: LayerView | PassingView, layout: Layout, entered: bool) -> Clean:
        """Return copies of the tensors in a layer's view that rows need.

        Parameters
        ----------
        view
            The layer.
        layout
            Layout of the rows.
        entered
            Whether rows enter the layer, and not only branch off in it.
        """
        more = None
        heads, mixer_write, mixer, mlp_write = None, None, None, view.mlp_write
        assert mlp_write is not None
        added = [mlp_write]
        if isinstance(view, LayerView):
            assert view.attention_write is not None
            heads = CleanHeads.of(view, layout)
            added.append(view.attention_write)
            if view.more_input is not None:
                more = layout.source.take(view.more_input)
        if view.architecture.mixes(view.index):
            assert view.mixer_write is not None
            mixer_write = layout.source.take(view.mixer_write)
            mixer = RowMixer.of(view, layout) if entered else None
            added.append(view.mixer_write)
        residual = layout.source.take(view.residual)
        # In float32, or in float64 for a float64 model: torch refuses to narrow in a norm.
        size = sum(
            x.norm(dim=-1, dtype=torch.promote_types(x.dtype, torch.float32)).float()
            for x in (residual, *(layout.source.take(x) for x in added))
        )
        assert isinstance(size, torch.Tensor)
        parallel = view.architecture.parallel
        return cls(
            view.architecture,
            view.index,
            view.block,
            residual,
            layout.source.take(mlp_write) if parallel else None,
            size,
            heads,
            mixer_write,
            mixer,
            more,
        )

    def ends(self, layout: Layout) -> Clean:
        """Return the same with what rows branch off only at the prompts' last positions."""
        heads = self.heads
        mlp_write, mixer_write, more = (
            None if x is None else layout.ends(x)
            for x in (self.mlp_write, self.mixer_write, self.more)
        )
        return replace(
            self,
            residual=layout.ends(self.residual),
            mlp_write=mlp_write,
            mixer_write=mixer_write,
            more=more,
            heads=None if heads is None else replace(heads, z=layout.ends(heads.z)),
        )

    @property
    def score(self) -> Float32[torch.Tensor, " *prompts"]:
        """Largest absolute score of each prompt (B,); 0 in a layer without heads."""
        return self.size.new_zeros(()) if self.heads is None else self.heads.score


@dataclass
class Carried:
    """Keys and values of a layer, carried along for later layers that use them.

    Attributes
    ----------
    clean
        (G, S, K, ...) in the clean run.
    rows
        (G, n, S, K, ...) of the rows; None as long as there are none.
    """

    clean: KeysValues
    rows: KeysValues | None


def advance(
    clean: Clean,
    rows: Float[torch.Tensor, "G n_before S d_model"] | None,
    moves: Moves,
    change: Replaces,
    layout: Layout,
    carried: dict[int, Carried],
    only_last: bool = False,
) -> Float[torch.Tensor, "G n end d_model"] | None:
    """Pass rows through a block, add the rows that branch off in it, and return both.

    Parameters
    ----------
    clean
        The layer in the clean run.
    rows
        (G, n_before, S, d_model) entering the block; None if no row has branched off yet.
    moves
        Rows that continue and rows that branch off.
    change
        Change of the heads in rows that branch off.
    layout
        Layout of the rows.
    carried
        The rows' keys and values (G, n, S, K, ...) of earlier layers that later ones use, by
        layer; updated.
    only_last
        Whether to compute only the prompts' last positions; enough in the last block.

    Returns
    -------
    Tensor or None
        (G, n_kept + n_new, S or Q, d_model) leaving the block; None without rows.
    """
    if rows is None and not moves.n_new:
        if clean.heads is not None and clean.heads.own is not None:
            # Rows that branch off later may read these keys and values.
            carried[clean.index] = Carried(clean.heads.own, None)
        return None
    architecture, block = clean.architecture, clean.block
    last = layout if only_last and layout.n_changed > 1 else None
    if last is not None:
        clean = clean.ends(last)
    z = mixed = own = None
    if rows is not None:
        if clean.heads is not None:
            z, own = _attend(clean, clean.heads, rows, layout, last, carried)
        if clean.mixer is not None:
            mixed = clean.mixer.mix(rows)
            mixed = mixed if last is None else last.row_ends(mixed)
        rows = rows if last is None else last.row_ends(rows)

    def together(
        of_clean: torch.Tensor, of_rows: torch.Tensor | None, changed: bool = False
    ) -> torch.Tensor:
        parts = [] if of_rows is None or not moves.n_kept else [moves.going_on(of_rows)]
        if moves.n_new:
            new = moves.branching(of_clean, of_rows)
            if changed:
                new = change.apply(new, moves.swap, clean.index, last)
            parts.append(new.expand(-1, moves.n_new, *[-1] * (new.dim() - 2)))
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    middle = together(clean.residual, rows)
    if clean.heads is not None and clean.heads.own is not None:
        carried[clean.index] = Carried(clean.heads.own, own)
    for theirs in carried.values():
        of_keys, of_values = theirs.rows or (None, None)
        keys, values = (x.to(middle.device) for x in theirs.clean)
        theirs.rows = together(keys, of_keys), together(values, of_values)
    if clean.heads is not None:
        heads = together(clean.heads.z, z, changed=True)
        output = call(architecture.projection(block), heads.flatten(-2))
        middle = middle + architecture.write(block, output)
    if clean.mixer_write is not None:
        middle = middle + together(clean.mixer_write, mixed)
    if architecture.has_mlp(clean.index):
        if not architecture.parallel:
            middle = middle + _mlp_write(clean, middle)
        else:
            # The MLP reads the block's input; a new row takes its parent's MLP output.
            assert clean.mlp_write is not None
            of_rows = None if rows is None else _mlp_write(clean, rows)
            middle = middle + together(clean.mlp_write, of_rows)
    more = None if clean.more is None else clean.more[:, None].expand(-1, middle.shape[1], -1, -1)
    return architecture.leave(block, middle, more)


def _mlp_write(
    clean: Clean, x: Float[torch.Tensor, "G n end d_model"]
) -> Float[torch.Tensor, "G n end d_model"]:
    """Return what the MLP adds to residual streams."""
    architecture, block = clean.architecture, clean.block
    output = architecture.feed_forward(block, architecture.mlp_input(block, x))
    return architecture.mlp_write(block, output)


def _attend(
    clean: Clean,
    heads: CleanHeads,
    rows: Float[torch.Tensor, "G n S d_model"],
    layout: Layout,
    last: Layout | None,
    carried: dict[int, Carried],
) -> tuple[Float[torch.Tensor, "G n end H D"], KeysValues | None]:
    """Return z (G, n, S or Q, H, D) of the rows, and keys and values that later layers use."""
    architecture, block = clean.architecture, clean.block
    normed = architecture.attention_input(block, rows)
    projected = [call(module, normed) for module in architecture.qkv(block)]
    query, key, value = architecture.split(block, projected)
    gate = architecture.gate(block, projected)
    query = architecture.turn(block, query, heads.positions, query=True)
    source = architecture.keys_of(clean.index)
    if source == clean.index:
        key = architecture.turn(block, key, heads.positions, query=False)
    else:
        theirs = carried[source].rows
        assert theirs is not None
        key, value = (x.to(query.device) for x in theirs)
    if last is not None:
        query = last.row_ends(query)
        gate = None if gate is None else last.row_ends(gate)
    scale, cap = architecture.scaling(clean.index), architecture.score_softcap
    scoring = Scoring(heads.key, heads.value, scale, cap, heads.bias, heads.sinks)
    reach = (architecture.window(clean.index), architecture.chunk(clean.index))
    seen = layout.seen(*reach, last is not None, rows.device)
    if layout.n_changed <= FEW:
        z = attend_few(scoring, query, key, value, seen)
    else:
        causal = layout.causal and reach == (None, None) and last is None
        z = attend_many(scoring, query, key, value, None if causal else seen)
    z = z if gate is None else z * gate
    return z, None if heads.own is None else (key, value)
