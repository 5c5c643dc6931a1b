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
from typing import Any

import torch
from jaxtyping import Bool, Float, Float32
from torch.nn import functional

from ..edits.prepared import BatchChange
from ..models import Architecture
from ..models.architecture import call
from ..models.positions import Positions, softcapped, softmax
from ..walk.everywhere import Everywhere
from ..walk.walk import LayerView
from .counterfactuals import Step
from .layout import Layout


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
            swap[row, list(numbers)] = True
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


@dataclass
class Clean:
    """Tensors of one layer of the clean run that rows need.

    Attributes
    ----------
    residual, mlp_write
        (G, S, d_model); the latter only if the block is parallel.
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
    size
        (G, S) sum of the norms of residual stream, attention output and MLP output.
    score
        (B,) largest absolute QK score of each prompt's last position at a visible key.
    """

    architecture: Architecture
    index: int
    block: Any
    residual: Float[torch.Tensor, "G end d_model"]
    mlp_write: Float[torch.Tensor, "G end d_model"] | None
    z: Float[torch.Tensor, "G end H D"]
    key: Float[torch.Tensor, "G E K d_key"]
    value: Float[torch.Tensor, "G E K D"]
    positions: Positions
    bias: Float[torch.Tensor, "G H all"] | None
    sinks: Float[torch.Tensor, " H"] | None
    size: Float32[torch.Tensor, "G S"]
    score: Float32[torch.Tensor, " B"]

    @classmethod
    def of(cls, view: LayerView, layout: Layout) -> Clean:
        """Return copies of the tensors in a layer's view that rows need."""

        def at(x: torch.Tensor, index: Everywhere) -> torch.Tensor:
            return x.flatten(0, 1)[index.on(x.device)]

        def of_changed(table: torch.Tensor) -> torch.Tensor:
            whole = table.expand(len(view.residual), *[-1] * (table.dim() - 1))
            return at(whole, layout.source).unsqueeze(1)

        bias = view.positions.bias
        if bias is not None:
            by_key = bias.expand(len(view.residual), -1, -1).transpose(1, 2)
            keys = [at(by_key, index) for index in (layout.earlier, layout.source)]
            bias = torch.cat(keys, dim=1).transpose(1, 2)
        assert view.attention_write is not None
        assert view.mlp_write is not None
        residual = at(view.residual, layout.source)
        added = (at(x, layout.source) for x in (view.attention_write, view.mlp_write))
        # In float32, or in float64 for a float64 model: torch refuses to narrow in a norm.
        size = sum(
            x.norm(dim=-1, dtype=torch.promote_types(x.dtype, torch.float32)).float()
            for x in (residual, *added)
        )
        assert isinstance(size, torch.Tensor)
        mlp_write = view.mlp_write if view.architecture.parallel else None
        return cls(
            view.architecture,
            view.index,
            view.block,
            residual,
            None if mlp_write is None else at(mlp_write, layout.source),
            at(view.z, layout.source),
            at(view.turned_key, layout.earlier),
            at(view.value, layout.earlier),
            view.positions.tables(of_changed),
            bias,
            view.sinks,
            size,
            view.score_size.amax(dim=-1),
        )

    def ends(self, layout: Layout) -> Clean:
        """Return the same with residual, z and MLP write only at the prompts' last positions."""
        mlp_write = None if self.mlp_write is None else layout.ends(self.mlp_write)
        return replace(
            self,
            residual=layout.ends(self.residual),
            z=layout.ends(self.z),
            mlp_write=mlp_write,
        )


def advance(
    clean: Clean,
    rows: Float[torch.Tensor, "G n_before S d_model"] | None,
    moves: Moves,
    change: RowChange,
    layout: Layout,
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
    only_last
        Whether to compute only the prompts' last positions; enough in the last block.

    Returns
    -------
    Tensor or None
        (G, n_kept + n_new, S or Q, d_model) leaving the block; None without rows.
    """
    if rows is None and not moves.n_new:
        return None
    architecture, block = clean.architecture, clean.block
    last = layout if only_last and layout.n_changed > 1 else None
    if last is not None:
        clean = clean.ends(last)
    z = None
    if rows is not None:
        z = _attend(clean, rows, layout, last)
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

    residual = together(clean.residual, rows)
    heads = together(clean.z, z, changed=True)
    output = call(architecture.projection(block), heads.flatten(-2))
    middle = residual + architecture.write(block, output)
    if not architecture.parallel:
        return middle + _mlp_write(clean, middle)
    # In a parallel block the MLP reads the block's input; a new row takes its parent's MLP output.
    assert clean.mlp_write is not None
    of_rows = None if rows is None else _mlp_write(clean, rows)
    return middle + together(clean.mlp_write, of_rows)


def _mlp_write(
    clean: Clean, x: Float[torch.Tensor, "G n end d_model"]
) -> Float[torch.Tensor, "G n end d_model"]:
    """Return what the MLP adds to residual streams."""
    architecture, block = clean.architecture, clean.block
    output = architecture.feed_forward(block, architecture.mlp_input(block, x))
    return architecture.mlp_write(block, output)


def _attend(
    clean: Clean,
    rows: Float[torch.Tensor, "G n S d_model"],
    layout: Layout,
    last: Layout | None,
) -> Float[torch.Tensor, "G n end H D"]:
    """Return z (G, n, S or Q, H, D) of the rows."""
    architecture, block = clean.architecture, clean.block
    normed = architecture.attention_input(block, rows)
    projected = [call(module, normed) for module in architecture.qkv(block)]
    query, key, value = architecture.split(block, projected)
    gate = architecture.gate(block, projected)
    query = architecture.turn(block, query, clean.positions, query=True)
    key = architecture.turn(block, key, clean.positions, query=False)
    if last is not None:
        query = last.row_ends(query)
        gate = None if gate is None else last.row_ends(gate)
    reach = (architecture.window(clean.index), architecture.chunk(clean.index))
    if layout.n_changed == 1:
        earlier = layout.seen(*reach, False, rows.device)[..., :-1]
        z = _attend_one(clean, query, key, value, earlier)
    else:
        causal = layout.causal and reach == (None, None) and last is None
        seen = None if causal else layout.seen(*reach, last is not None, rows.device)
        z = _attend_many(clean, query, key, value, seen)
    return z if gate is None else z * gate


def _attend_one(
    clean: Clean,
    query: Float[torch.Tensor, "G n 1 H D"],
    key: Float[torch.Tensor, "G n 1 K D"],
    value: Float[torch.Tensor, "G n 1 K D"],
    seen: Bool[torch.Tensor, "G 1 E"],
) -> Float[torch.Tensor, "G n 1 H D"]:
    """Return z (G, n, 1, H, D) of rows of one position, which share the clean keys uncopied."""
    n_kv, n_rows, scale = key.shape[3], query.shape[1], clean.architecture.scaling(clean.index)
    cap, bias, sinks = clean.architecture.score_softcap, clean.bias, clean.sinks
    # (G, n, 1, H, D) to (G, K, n H/K, D), so that each key head's queries are one matrix.
    q = query[:, :, 0].unflatten(2, (n_kv, -1)).permute(0, 2, 1, 3, 4).flatten(2, 3)
    # In float32, like the accumulation in the model's kernels; rounded scores give wrong weights.
    q = q.float()
    earlier = q @ clean.key.float().permute(0, 2, 3, 1) * scale
    k, v = (x[:, :, 0].permute(0, 2, 1, 3).unsqueeze(3) for x in (key, value))
    own_query = q.unflatten(2, (n_rows, -1))
    own = ((own_query * k.float()).sum(dim=-1).flatten(2) * scale).unsqueeze(-1)
    earlier, own = softcapped(earlier, cap), softcapped(own, cap)

    def by_row(x: torch.Tensor) -> torch.Tensor:  # (..., H, keys) to (..., K, n H/K, keys)
        grouped = x.unflatten(-2, (n_kv, 1, -1))
        return grouped.expand(*[-1] * (grouped.dim() - 3), n_rows, -1, -1).flatten(-3, -2)

    if bias is not None:
        earlier, own = earlier + by_row(bias[..., :-1]), own + by_row(bias[..., -1:])
    earlier = earlier.masked_fill(~seen.unsqueeze(1), -torch.inf)
    column = None if sinks is None else by_row(sinks[:, None])[..., 0]
    weights = softmax(torch.cat((earlier, own), dim=-1), column).to(value.dtype)
    z: torch.Tensor = weights[..., :-1] @ clean.value.permute(0, 2, 1, 3)
    z = z.unflatten(2, (n_rows, -1)) + weights[..., -1:].unflatten(2, (n_rows, -1)) * v
    return z.permute(0, 2, 1, 3, 4).flatten(2, 3).unsqueeze(2)


def _attend_many(
    clean: Clean,
    query: Float[torch.Tensor, "G n end H D"],
    key: Float[torch.Tensor, "G n S K D"],
    value: Float[torch.Tensor, "G n S K D"],
    seen: Bool[torch.Tensor, "G end all"] | None,
) -> Float[torch.Tensor, "G n end H D"]:
    """Return z (G, n, S or Q, H, D) of rows of several positions; `seen` None means causal."""
    n_packs, n_rows = query.shape[:2]

    def whole(
        earlier: Float[torch.Tensor, "G E K D"], own: Float[torch.Tensor, "G n S K D"]
    ) -> Float[torch.Tensor, "rows K all D"]:
        if earlier.shape[1]:
            shared = earlier[:, None].expand(-1, n_rows, -1, -1, -1)
            own = torch.cat((shared, own), dim=2)
        return own.flatten(0, 1).transpose(1, 2)

    mask = None
    if seen is not None:
        mask = seen[:, None].expand(-1, n_rows, -1, -1).flatten(0, 1)[:, None]
    z = _softmax_attention(
        clean,
        query.flatten(0, 1).transpose(1, 2),
        whole(clean.key, key),
        whole(clean.value, value),
        mask,
        n_rows,
    )
    by_row: torch.Tensor = z.transpose(1, 2).unflatten(0, (n_packs, n_rows))
    return by_row


def _softmax_attention(
    clean: Clean,
    query: Float[torch.Tensor, "rows H end d_key"],
    key: Float[torch.Tensor, "rows K all d_key"],
    value: Float[torch.Tensor, "rows K all D"],
    mask: Bool[torch.Tensor, "rows 1 end all"] | None,
    n_rows: int,
) -> Float[torch.Tensor, "rows H end D"]:
    """Return attention's output; `mask` None means causal."""
    cap, sinks, bias = clean.architecture.score_softcap, clean.sinks, clean.bias
    scale = clean.architecture.scaling(clean.index)
    if cap is None and sinks is None and bias is None:
        return functional.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=True
        )
    # torch's kernels know neither softcaps nor sinks.
    if mask is None:
        n = query.shape[2]
        mask = torch.ones(n, n, dtype=torch.bool, device=query.device).tril()[None, None]
    grouped = query.float().unflatten(1, (key.shape[1], -1))
    scores = (grouped @ key.float().mT.unsqueeze(2)).flatten(1, 2) * scale
    scores = softcapped(scores, cap)
    if bias is not None:
        scores = scores + bias.repeat_interleave(n_rows, dim=0)[:, :, None]
    scores = scores.masked_fill(~mask, -torch.inf)
    weights = softmax(scores, None if sinks is None else sinks[:, None]).to(value.dtype)
    grouped = weights.unflatten(1, (value.shape[1], -1))
    return (grouped @ value.unsqueeze(2)).flatten(1, 2)
