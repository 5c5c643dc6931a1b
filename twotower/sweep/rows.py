"""Counterfactual rows: what a prompt's positions would be, had heads been changed.

A row is the residual stream of a pack's changed positions (see `layout`) in one
counterfactual run (see `counterfactuals`). It branches off at the layer of its heads and
goes through the blocks above; its queries attend to the clean keys and values of the
unchanged positions and to the row's own. Each row is exact: it equals a separate forward
with the heads changed. With changes at the last position alone a row is one vector, and
one walk sweeps all heads for about the cost of one more forward.

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
    """A step's numbers as tensors, made before the walk so that it never waits for them.

    Attributes
    ----------
    n_before, n_kept, n_new
        Rows that come from below, those of them that go on, and those that branch off.
    kept
        (n_kept,) which go on; None for all.
    parents
        (n_new,) parents of those that branch off, the clean run being 0 and row i being
        i + 1; None where all branch off the clean run.
    swap
        (n_new, H) boolean: heads changed in each.
    """

    n_before: int
    n_kept: int
    n_new: int
    kept: Everywhere | None
    parents: Everywhere | None
    swap: Everywhere

    @classmethod
    def of(cls, step: Step, device: torch.device, n_heads: int) -> Moves:
        """The tensors of a step, on the device of its layer."""
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
        """(G, n_kept, ...) of rows (G, n_before, ...)."""
        return rows if self.kept is None else rows[:, self.kept.on(rows.device)]

    def branching(
        self,
        clean: Float[torch.Tensor, " G *rest"],
        rows: Float[torch.Tensor, "G n_before *rest"] | None,
    ) -> Float[torch.Tensor, "G n_new *rest"]:
        """(G, n_new or 1, ...) what parents have, of the clean run (G, ...) and of rows."""
        if self.parents is None:
            return clean[:, None]
        assert rows is not None
        both = torch.cat((clean[:, None], rows), dim=1)
        return both[:, self.parents.on(both.device)]


@dataclass
class RowChange:
    """What the changed heads' outputs become in rows.

    Attributes
    ----------
    at
        (G, S) boolean: positions at which heads are changed.
    change
        What their outputs become, at the positions (G, S).
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
        """z (G, n or 1, S, H, D) to (G, n, S, H, D), in each row its heads changed."""
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
    """What rows need of a layer of the clean run.

    Attributes
    ----------
    residual, mlp_output
        (G, S, d_model); the latter only where the block is parallel.
    z
        (G, S, H, D).
    key, value
        (G, E, K, D) of the unchanged positions, keys after rotary.
    cos, sin
        (G, 1, S, 1, rotated) rotary tables, or None.
    size
        (G, S) lengths of the residual stream, the attention output and the MLP output, summed.
    score
        (B,) largest absolute score that each prompt's last position attends to.
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
        """The part of a view that rows need, copied."""

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
        # In float32, or in float64 where the model is; torch narrows nothing in a norm.
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
        """The same at prompts' last positions alone; keys, values and tables whole."""
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
        """Rotary embedding of x (G, n, S, heads, D)."""
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
    """Rows taken through a block, and those that branch off in it.

    Parameters
    ----------
    clean
        The layer in the clean run.
    rows
        (G, n_before, S, d_model) entering the block; None where there are none yet.
    moves
        Which of them go on, and which branch off.
    change
        What the heads of those that branch off become.
    layout
        Where rows lie.
    only_last
        Whether to leave out all but prompts' last positions; nothing else is read of the
        last block.

    Returns
    -------
    Tensor or None
        (G, n_kept + n_new, S or Q, d_model) leaving the block.
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
    # Here the MLP reads what enters the block, which in a branching row is its parent's.
    assert clean.mlp_output is not None
    of_rows = None if rows is None else call(mlp, norm(rows))
    return middle + together(clean.mlp_output, of_rows)


def _attend(
    clean: Clean,
    rows: Float[torch.Tensor, "G n S d_model"],
    layout: Layout,
    last: Layout | None,
) -> Float[torch.Tensor, "G n end H D"]:
    """z (G, n, S or Q, H, D) of the rows."""
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
    """z (G, n, 1, H, D) of rows of one position: clean keys are shared, not copied."""
    n_kv, n_rows = key.shape[3], query.shape[1]
    # (G, n, 1, H, D) to (G, K, n H/K, D), so that each key head's queries are one matrix.
    q = query[:, :, 0].unflatten(2, (n_kv, -1)).permute(0, 2, 1, 3, 4).flatten(2, 3)
    # In float32, as the model's own kernels accumulate; a rounded score is a wrong weight.
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
    """z (G, n, S or Q, H, D) of rows of several positions; `seen` None is causal."""
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
