"""Comparisons of the check at load: each block is reassembled from its parts, inside a trace.

Shapes: B prompts of T positions, H heads on K key-value heads.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int

from .architecture import call
from .positions import Positions, softcapped, softmax, visible
from .rounding import Rounding, coarsest, roundoff

if TYPE_CHECKING:
    from .architecture import Architecture

Pair = tuple[torch.Tensor, torch.Tensor]
"""An error and the allowed error."""


def check_walk(
    architecture: Architecture,
    root: Any,
    mask: Int[torch.Tensor, "B T"],
    factor: float | None,
    rounding: Rounding,
) -> dict[str, Any]:
    """Return each layer's errors and allowed errors, logits, stream and dtype; inside a trace.

    Parameters
    ----------
    architecture, root
        The adapter and the model.
    mask
        1 for tokens, 0 for padding.
    factor
        Factor on every other element of the heads' outputs; None to leave them.
    rounding
        Allowed errors.
    """
    walk = CheckWalk(architecture, mask.bool(), factor, rounding)
    for index, block in enumerate(architecture.layers(root)):
        walk.block(index, block)
    norm, unembedding = architecture.final_norm(root), architecture.unembedding(root)
    architecture.epsilon(norm)  # raises if it is unknown
    end = architecture.end(root)
    walk.compare_sum(end)
    dtype = unembedding.input.dtype
    coarse = coarsest(end, unembedding.input)
    unembedded = architecture.logits(unembedding(norm(end[:, -1]).to(dtype))).float().cpu()
    # The model's own logits, after any change to the unembedding's output.
    logits = root.output.logits
    allowed = torch.tensor(
        2 * rounding.module(coarse), dtype=torch.float32
    )  # a norm comes before each module
    walk.pairs["again"] = [(layer, error, allowed) for layer, error in walk.again]
    return {
        "pairs": {
            name: [(layer, error.cpu(), allowed.cpu()) for layer, error, allowed in found]
            for name, found in walk.pairs.items()
        },
        "logits": logits[:, -1].float().cpu(),
        "end": end[:, -1].float().cpu(),
        "written": bool(torch.stack(walk.written).max() > 0),
        "dtype": coarse,
        "unembedded": unembedded,
    }


class CheckWalk:
    """Compares the blocks of a model, one after the other.

    Attributes
    ----------
    pairs
        Layer, error and allowed error, by identity.
    again
        Layer and error of modules that are called again.
    written
        Largest output of attention at the last position, by layer.
    keys
        Keys, after rotary, and values, by layer.
    """

    def __init__(
        self,
        architecture: Architecture,
        kept: Bool[torch.Tensor, "B T"],
        factor: float | None,
        rounding: Rounding,
    ) -> None:
        self.architecture, self.kept, self.factor = architecture, kept, factor
        self.rounding = rounding
        names = ("sum", "attention", "block", "edit")
        self.pairs: dict[str, list[tuple[int, torch.Tensor, torch.Tensor]]] = {
            name: [] for name in names
        }
        self.again: list[tuple[int, torch.Tensor]] = []
        self.written: list[torch.Tensor] = []
        self.parts: tuple[int, list[torch.Tensor], torch.dtype, bool] | None = None
        self.keys: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def compare_sum(self, after: Float[torch.Tensor, "B T d_model"]) -> None:
        """Compare the sum of the last block's parts with what follows it.

        This is the next layer's input, not the block's own output, to detect anything in between.
        """
        if self.parts is not None:
            layer, parts, dtype, scaled = self.parts
            after = after[self.kept.to(after.device)]
            pair = _of_block(parts, dtype, scaled, after, self.rounding)
            self.pairs["block"].append((layer, *pair))

    def block(self, index: int, block: Any) -> None:
        """Read a block and compare it, in the order in which it computes."""
        architecture = self.architecture
        residual = block.input
        self.compare_sum(residual)
        more = architecture.more_input(block)
        added, mixed = [], None
        if architecture.mixes(index):
            mixed = architecture.mixer_output(block)
            added.append(architecture.mixer_written(block, mixed))
        projected = None
        if architecture.has_heads(index):
            projected, write = self._heads(index, block)
            added.append(write)
        mlp_output = None
        if architecture.has_mlp(index):
            mlp_output = architecture.mlp_output(block)
            added.append(architecture.mlp_written(block, mlp_output))
        more_write = architecture.more_written(block)
        if more_write is not None:
            added.append(more_write)
        if self.factor is not None:
            return
        device = added[0].device
        # accelerate moves the residual stream to the layer's device only later.
        residual = residual.to(device)
        seen = self.kept.to(device)
        factor = architecture.stream_factor(block)
        scale = 1.0 if factor is None else factor
        parts = (residual, *added)
        scaled = [x.to(device)[seen].float() * scale for x in parts]
        self.parts = index, scaled, coarsest(*parts), factor is not None
        pairs = []
        if mixed is not None:
            x = architecture.mixer_input(block, residual)
            pairs.append((architecture.mix(block, x, seen)[seen], mixed[seen]))
        if projected is not None:
            normed = architecture.attention_input(block, residual)
            # After the split, because some models change the projections' outputs in place.
            again, own = (
                [*architecture.split(block, outputs), architecture.gate(block, outputs)]
                for outputs in (
                    [call(module, normed) for module in architecture.qkv(block)],
                    projected,
                )
            )
            both = zip(again, own, strict=True)
            pairs += [(a, b) for a, b in both if a is not None and b is not None]
        if mlp_output is not None:
            before = added[: -1 if more_write is None else -2]
            middle = residual if architecture.parallel else sum(before, residual)
            x = architecture.mlp_input(block, middle)
            pairs.append((architecture.feed_forward(block, x), mlp_output))
        if more_write is not None:
            after_mlp = sum(added[:-1], residual)
            pairs.append(
                (architecture.leave(block, after_mlp, more), (after_mlp + more_write) * scale)
            )
        # Called as a sweep calls them. This detects interventions that act only on the model's own
        # forward pass, such as nnsight edits.
        errors = [
            (a.float() - b.float()).norm(dim=-1).amax() / _positive(b.float().norm(dim=-1).amax())
            for a, b in pairs
        ]
        self.again.append((index, torch.stack(errors).amax()))

    def _heads(self, index: int, block: Any) -> tuple[list[torch.Tensor], torch.Tensor]:
        """Compare a block's heads; return the projections' outputs and what attention adds."""
        architecture, rounding = self.architecture, self.rounding
        attention = architecture.attention(block)
        positions = architecture.positions(attention, index)
        projected = [module.output for module in architecture.qkv(block)]
        projection = architecture.projection(block)
        z = projection.input
        if self.factor is not None:
            # Only every other element: a norm after attention would undo a factor on all.
            factors = torch.ones_like(z[:1, :1])
            factors[..., ::2] = self.factor
            z = z * factors
            projection.input = z
        output = projection.output
        sinks = architecture.sinks(attention)
        write = architecture.written(block, output)
        self.written.append(output[:, -1].abs().max().float().cpu())
        seen = self.kept.to(z.device)
        if self.factor is not None:
            everywhere = torch.ones_like(seen)
            pair = _of_module(projection(z), output, output.abs(), everywhere, rounding)
            self.pairs["edit"].append((index, *pair))
            return projected, write
        q, k, v = architecture.split(block, projected)
        heads = z.unflatten(-1, (architecture.heads_in(index), -1))
        source = architecture.keys_of(index)
        if source == index:
            self.keys[index] = architecture.turn(block, k, positions, query=False), v
        k, v = self.keys[source]
        q = architecture.turn(block, q, positions, query=True)
        again, length, *sizes = attend(architecture, index, q, k, v, positions, sinks, seen)
        gate = architecture.gate(block, projected)
        if gate is not None:
            again, length = again * gate, length * gate.float().abs().amax(dim=-1)
        error = (again.float() - heads.float()).norm(dim=-1) / _positive(length)
        pair = _pair(error, rounding.attention(z.dtype, *sizes), seen)
        self.pairs["attention"].append((index, *pair))
        alone = torch.eye(heads.shape[2], dtype=z.dtype, device=z.device)[:, None, None, :, None]
        nothing = projection(torch.zeros_like(z[:1, :1]))
        each = (call(projection, (heads * alone).flatten(-2)) - nothing).float()
        whole, total = each.sum(dim=0) + nothing, each.abs().sum(dim=0) + nothing.abs()
        self.pairs["sum"].append((index, *_of_module(whole, output, total, seen, rounding)))
        return projected, write


def _pair(error: torch.Tensor, allowed: torch.Tensor, seen: torch.Tensor) -> Pair:
    """Return the worst of errors (B, T, ...) at unmasked positions, and the allowed error there."""
    error, allowed = error[seen].flatten(), allowed.expand_as(error)[seen].flatten()
    strain = (error / allowed).nan_to_num(nan=torch.inf, posinf=torch.inf)
    at = strain.argmax()
    return error[at], allowed[at]


def _of_block(
    parts: list[torch.Tensor],
    dtype: torch.dtype,
    scaled: bool,
    after: torch.Tensor,
    rounding: Rounding,
) -> Pair:
    """Compare the sum of a block's parts (n, d_model) with the next block's input."""
    stacked = torch.stack([part.to(after.device) for part in parts])
    dtype = max(dtype, after.dtype, key=roundoff)
    error = (stacked.sum(dim=0) - after.float()).abs() / _positive(stacked.abs().sum(dim=0))
    return error.amax(), torch.tensor(rounding.sum(dtype, scaled))


def _of_module(
    found: Float[torch.Tensor, "B T d_model"],
    expected: Float[torch.Tensor, "B T d_model"],
    size: Float[torch.Tensor, "B T d_model"],
    seen: torch.Tensor,
    rounding: Rounding,
) -> Pair:
    """Compare vectors computed in two ways, relative to the largest element of each size vector."""
    largest = _positive(size.float().amax(dim=-1))
    error = (found.float() - expected.float()).abs().amax(dim=-1) / largest
    return error[seen].amax(), torch.tensor(rounding.module(expected.dtype))


def _positive(size: torch.Tensor) -> torch.Tensor:
    return size.clamp(min=torch.finfo(size.dtype).tiny)


def attend(
    architecture: Architecture,
    layer: int,
    query: Float[torch.Tensor, "B T H d_key"],
    key: Float[torch.Tensor, "B T K d_key"],
    value: Float[torch.Tensor, "B T K D"],
    positions: Positions,
    sinks: Float[torch.Tensor, " H"] | None,
    kept: Bool[torch.Tensor, "B T"],
) -> tuple[
    Float[torch.Tensor, "B T H D"],
    Float[torch.Tensor, "B T H"],
    Float[torch.Tensor, "B T H"],
    Float[torch.Tensor, "B T H"],
]:
    """Return recomputed z, and for each position and head what its tolerance follows from.

    These are the mean norm of the attended values, the largest absolute score, and the largest
    product of the norms of query and key, times the scaling.
    """
    per, bias = query.shape[2] // key.shape[2], positions.bias
    key, value = (x.repeat_interleave(per, dim=2).transpose(1, 2).float() for x in (key, value))
    scores = query.transpose(1, 2).float() @ key.mT * architecture.scaling(layer)
    scores = softcapped(scores, architecture.score_softcap)
    if bias is not None:
        scores = scores + bias[:, :, None]
    seen = visible(kept, kept.shape[1], architecture.window(layer), architecture.chunk(layer))
    masked = scores.masked_fill(~seen[:, None], -torch.inf)
    weights = softmax(masked, None if sinks is None else sinks[:, None])
    length = (weights @ value.norm(dim=-1)[..., None])[..., 0]
    hidden = ~seen[:, None]
    size = scores.masked_fill(hidden, 0).abs().amax(dim=-1)
    norms = key.norm(dim=-1)[:, :, None].masked_fill(hidden, 0).amax(dim=-1)
    products = norms.transpose(1, 2) * query.float().norm(dim=-1) * architecture.scaling(layer)
    return (
        (weights @ value).transpose(1, 2),
        length.transpose(1, 2),
        size.transpose(1, 2),
        products,
    )
