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
    residual, mlp_output
        (G, S, d_model); the latter only if the block is parallel.
    z
        (G, S, H, D).
    key, value
        (G, E, K, D) of the unchanged positions, keys after rotary.
    cos, sin
        (G, 1, S, 1, rotated) rotary tables, or None.
    size
        (G, S) sum of the norms of residual stream, attention output and MLP output.
    score
        (B,) largest absolute QK score of each prompt's last position at a visible key.
    """

    architecture: Architecture
    index: int
    block: Any
    residual: Float[torch.Tensor, "G end d_model"]
    mlp_output: Float[torch.Tensor, "G end d_model"] | None
    z: Float[torch.Tensor, "G end H D"]
    key: Float[torch.Tensor, "G E K D"]
    value: Float[torch.Tensor, "G E K D"]
    cos: Float[torch.Tensor, "G 1 S 1 rotated"] | None
    sin: Float[torch.Tensor, "G 1 S 1 rotated"] | None
    size: Float32[torch.Tensor, "G S"]
    score: Float32[torch.Tensor, " B"]

    @classmethod
    def of(cls, view: LayerView, layout: Layout) -> Clean:
        """Return copies of the tensors in a layer's view that rows need."""

        def at(x: torch.Tensor, index: Everywhere) -> torch.Tensor:
            return x.flatten(0, 1)[index.on(x.device)]

        cos: torch.Tensor | None = None
        sin: torch.Tensor | None = None
        if view.cos is not None and view.sin is not None:
            n = len(view.residual)
            cos, sin = (
                at(t.expand(n, -1, -1, -1), layout.source).unsqueeze(1)
                for t in (view.cos, view.sin)
            )
        assert view.attention_output is not None
        assert view.mlp_output is not None
        residual = at(view.residual, layout.source)
        added = (at(x, layout.source) for x in (view.attention_output, view.mlp_output))
        # In float32, or in float64 for a float64 model: torch refuses to narrow in a norm.
        size = sum(
            x.norm(dim=-1, dtype=torch.promote_types(x.dtype, torch.float32)).float()
            for x in (residual, *added)
        )
        assert isinstance(size, torch.Tensor)
        mlp_output = view.mlp_output if view.architecture.parallel else None
        return cls(
            view.architecture,
            view.index,
            view.block,
            residual,
            None if mlp_output is None else at(mlp_output, layout.source),
            at(view.z, layout.source),
            at(view.rotated_key, layout.earlier),
            at(view.value, layout.earlier),
            cos,
            sin,
            size,
            view.score_size.amax(dim=-1),
        )

    def ends(self, layout: Layout) -> Clean:
        """Return the same with residual, z and MLP output only at the prompts' last positions."""
        mlp_output = None if self.mlp_output is None else layout.ends(self.mlp_output)
        return replace(
            self,
            residual=layout.ends(self.residual),
            z=layout.ends(self.z),
            mlp_output=mlp_output,
        )

    def rotate(
        self, x: Float[torch.Tensor, "G n S heads D"]
    ) -> Float[torch.Tensor, "G n S heads D"]:
        """Return x (G, n, S, heads, D) with the rotary embedding applied."""
        if self.cos is None or self.sin is None:
            return x
        return self.architecture.rotate(x, self.cos.to(x.dtype), self.sin.to(x.dtype))


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
    middle = residual + call(architecture.projection(block), heads.flatten(-2))
    mlp, norm = architecture.mlp(block), architecture.mlp_norm(block)
    if not architecture.parallel:
        return middle + call(mlp, norm(middle))
    # In a parallel block the MLP reads the block's input; a new row takes its parent's MLP output.
    assert clean.mlp_output is not None
    of_rows = None if rows is None else call(mlp, norm(rows))
    return middle + together(clean.mlp_output, of_rows)


def _attend(
    clean: Clean,
    rows: Float[torch.Tensor, "G n S d_model"],
    layout: Layout,
    last: Layout | None,
) -> Float[torch.Tensor, "G n end H D"]:
    """Return z (G, n, S or Q, H, D) of the rows."""
    architecture, block = clean.architecture, clean.block
    normed = architecture.attention_norm(block)(rows)
    query, key, value = architecture.split(
        block, [call(module, normed) for module in architecture.qkv(block)]
    )
    query, key = clean.rotate(query), clean.rotate(key)
    if last is not None:
        query = last.row_ends(query)
    window, scale = architecture.window(clean.index), architecture.scaling(clean.index)
    if layout.n_changed == 1:
        earlier = layout.seen(window, False, rows.device)[..., :-1]
        return _attend_one(clean, query, key, value, earlier, scale)
    causal = layout.causal and window is None and last is None
    seen = None if causal else layout.seen(window, last is not None, rows.device)
    return _attend_many(clean, query, key, value, seen, scale)


def _attend_one(
    clean: Clean,
    query: Float[torch.Tensor, "G n 1 H D"],
    key: Float[torch.Tensor, "G n 1 K D"],
    value: Float[torch.Tensor, "G n 1 K D"],
    seen: Bool[torch.Tensor, "G 1 E"],
    scale: float,
) -> Float[torch.Tensor, "G n 1 H D"]:
    """Return z (G, n, 1, H, D) of rows of one position, which share the clean keys uncopied."""
    n_kv, n_rows = key.shape[3], query.shape[1]
    # (G, n, 1, H, D) to (G, K, n H/K, D), so that each key head's queries are one matrix.
    q = query[:, :, 0].unflatten(2, (n_kv, -1)).permute(0, 2, 1, 3, 4).flatten(2, 3)
    # In float32, like the accumulation in the model's kernels; rounded scores give wrong weights.
    q = q.float()
    earlier = q @ clean.key.float().permute(0, 2, 3, 1) * scale
    earlier = earlier.masked_fill(~seen.unsqueeze(1), -torch.inf)
    k, v = (x[:, :, 0].permute(0, 2, 1, 3).unsqueeze(3) for x in (key, value))
    own_query = q.unflatten(2, (n_rows, -1))
    own = ((own_query * k.float()).sum(dim=-1).flatten(2) * scale).unsqueeze(-1)
    weights = torch.cat((earlier, own), dim=-1).softmax(dim=-1).to(value.dtype)
    z: torch.Tensor = weights[..., :-1] @ clean.value.permute(0, 2, 1, 3)
    z = z.unflatten(2, (n_rows, -1)) + weights[..., -1:].unflatten(2, (n_rows, -1)) * v
    return z.permute(0, 2, 1, 3, 4).flatten(2, 3).unsqueeze(2)


def _attend_many(
    clean: Clean,
    query: Float[torch.Tensor, "G n end H D"],
    key: Float[torch.Tensor, "G n S K D"],
    value: Float[torch.Tensor, "G n S K D"],
    seen: Bool[torch.Tensor, "G end all"] | None,
    scale: float,
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
    z = functional.scaled_dot_product_attention(
        query.flatten(0, 1).transpose(1, 2),
        whole(clean.key, key),
        whole(clean.value, value),
        attn_mask=mask,
        is_causal=mask is None,
        scale=scale,
        enable_gqa=True,
    )
    by_row: torch.Tensor = z.transpose(1, 2).unflatten(0, (n_packs, n_rows))
    return by_row
