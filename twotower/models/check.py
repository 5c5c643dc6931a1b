"""Check at load time that a model is read and edited correctly.

Prompts of unequal length run three times: unedited, with every head's output written back
unchanged, and with every head's output halved. From the first run, the check sums the parts of
each block and compares the sums with the model's own values. It also calls each module again on
its own input. The allowed differences are those of rounding (`rounding.py`).

Attention may change at a length that a short prompt does not reach. If the configuration names
such a length, the check also runs on a small random model of the same kind (`lengths.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import nnsight
import torch
from jaxtyping import Float, Int

from ..errors import CheckError
from ..results.findings import Finding
from .architecture import call
from .positions import softcapped, softmax
from .rounding import Rounding, coarsest, roundoff

if TYPE_CHECKING:
    from .architecture import Architecture
    from .model import Model

IDENTITIES = {
    "sum": "the heads' outputs do not sum to the attention output",
    "attention": "recomputed attention does not give the heads' outputs",
    "block": "residual stream, attention and MLP do not sum to the block's output",
    "again": "modules called again on the same input do not give the outputs of the forward pass",
    "edit": "halving the heads' outputs does not reach the output projection",
    "unembedding": "final norm and unembedding of the last residual stream do not give the logits",
    "no-op edit": "writing the heads' outputs back unchanged changes the logits",
}
"""Message for each identity that does not hold."""

SHORT = (7, 4)
"""Prompt lengths, in tokens."""


def check_model(model: Model, lengths: Sequence[int] = SHORT) -> dict[str, Finding]:
    """Check the identities that every measure relies on.

    Parameters
    ----------
    model
        A loaded model.
    lengths
        Prompt lengths, in tokens, longest first.

    Returns
    -------
    dict
        For each identity the worst error over the layers, and the allowed error.

    Raises
    ------
    CheckError
        If an identity does not hold. Names the identity, layer, error and allowed error.
    """
    plain, same, halved = _runs(model, lengths)
    found = {**plain["pairs"], "edit": halved["pairs"]["edit"]}
    rounding = Rounding.of(model)
    dtype: torch.dtype = plain["dtype"]
    size = plain["logits"].abs().amax()
    for name, other in (("unembedding", plain["unembedded"]), ("no-op edit", same["logits"])):
        error = (other - plain["logits"]).abs().amax() / size
        found[name] = [(error, torch.tensor(rounding.module(dtype)))]
    worst: dict[str, Finding] = {}
    for name in IDENTITIES:
        for layer, (error, allowed) in enumerate(found[name]):
            finding = Finding(float(error), float(allowed))
            if not finding.strain <= 1:
                place = f", layer {layer}" if len(found[name]) > 1 else ""
                raise CheckError(
                    f"{model.name}{place}: {IDENTITIES[name]} (error {finding.error:.2g}, at most "
                    f"{finding.allowed:.2g} is accepted). {_cause(model)}"
                )
            if name not in worst or finding.strain > worst[name].strain:
                worst[name] = finding
    # The checks above showed that norm and unembedding turn this stream into the logits.
    if plain["written"] and torch.equal(halved["end"], plain["end"]):
        raise CheckError(
            f"{model.name}: editing the heads' outputs does not change the last residual stream"
        )
    return worst


def _cause(model: Model) -> str:
    others = [] if model.state is None else model.state.interventions()
    if others:
        return f"Probably because of the {others[0]}; remove it, or write it as an edit"
    return (
        f"The adapter {type(model.architecture).__name__} does not fit this model; load with "
        "check=False only to find out why"
    )


def _prompts(model: Model, lengths: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return left-padded token ids and mask, both (prompts, longest)."""
    vocabulary, width = model.architecture.vocabulary_size, max(lengths)
    ids = torch.arange(len(lengths) * width).view(len(lengths), width) * 97
    ids = (ids % max(vocabulary - 11, 1) + min(10, vocabulary - 1)) % vocabulary
    mask = torch.ones_like(ids)
    for row, length in enumerate(lengths):
        mask[row, : width - length] = 0
    return ids.to(model.device), mask.to(model.device)


def _runs(model: Model, lengths: Sequence[int]) -> list[dict[str, Any]]:
    """Run the prompts unedited, with heads written back, and with heads halved, in one session."""
    architecture, root, rounding = model.architecture, model.traced, Rounding.of(model)
    ids, mask = _prompts(model, lengths)
    positions = (mask.cumsum(dim=-1) - 1).clamp(min=0)
    inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
    options = {"use_cache": False, "return_dict": True}
    where = {"remote": model.remote} if model.remote else {}
    with root.session(**where):
        found = nnsight.save([])
        with torch.no_grad():
            for factor in (None, 1.0, 0.5):
                with root.trace(**inputs, **options):
                    found.append(_walk(architecture, root, mask, factor, rounding))
    return list(found)


def _walk(
    architecture: Architecture,
    root: Any,
    mask: Int[torch.Tensor, "B T"],
    factor: float | None,
    rounding: Rounding,
) -> dict[str, Any]:
    """Return each layer's errors and allowed errors, logits, stream and dtype; inside a trace."""
    pairs: dict[str, list[Any]] = {"sum": [], "attention": [], "again": [], "block": [], "edit": []}
    written = []
    kept = mask.bool()
    parts: tuple[list[torch.Tensor], torch.dtype] | None = None
    for index, block in enumerate(architecture.layers(root)):
        residual = block.input
        if parts is not None:
            pairs["block"].append(_of_block(*parts, residual[kept.to(residual.device)], rounding))
        attention = architecture.attention(block)
        positions = architecture.positions(attention, index)
        projected = [module.output for module in architecture.qkv(block)]
        projection = architecture.projection(block)
        z = projection.input
        if factor is not None:
            z = z * factor
            projection.input = z
        attention_output = projection.output
        sinks = architecture.sinks(attention)
        attention_write = architecture.written(block, attention_output)
        written.append(attention_output[:, -1].abs().max().float().cpu())
        mlp_output = architecture.mlp_output(block)
        mlp_write = architecture.mlp_written(block, mlp_output)
        if factor is None:
            q, k, v = architecture.split(block, projected)
            heads = z.unflatten(-1, (architecture.n_heads, -1))
            seen = kept.to(z.device)
            k = architecture.turn(block, k, positions, query=False)
            q = architecture.turn(block, q, positions, query=True)
            scoring = (positions.bias, sinks)
            again, length, size = attend(architecture, index, q, k, v, scoring, mask)
            gate = architecture.gate(block, projected)
            if gate is not None:
                again, length = again * gate, length * gate.float().abs().amax(dim=-1)
            error = (again.float() - heads.float()).norm(dim=-1) / _positive(length)
            pairs["attention"].append(_pair(error, rounding.attention(z.dtype, size), seen))
            alone = torch.eye(heads.shape[2], dtype=z.dtype, device=z.device)[
                :, None, None, :, None
            ]
            nothing = projection(torch.zeros_like(z[:1, :1]))
            each = (call(projection, (heads * alone).flatten(-2)) - nothing).float()
            whole, sizes = each.sum(dim=0) + nothing, each.abs().sum(dim=0) + nothing.abs()
            pairs["sum"].append(_of_module(whole, attention_output, sizes, seen, rounding))
            # accelerate moves the residual stream to the layer's device only later.
            residual = residual.to(z.device)
            pairs["again"].append(
                _again(architecture, block, residual, projected, attention_write, mlp_output)
            )
            # Compare with the next layer's input, not with the block's own output, to detect
            # anything in between.
            added = (residual, attention_write, mlp_write)
            parts = [x[seen].float() for x in added], coarsest(*added)
        else:
            again = projection(z)
            everywhere = torch.ones_like(kept).to(z.device)
            sizes = attention_output.abs()
            pairs["edit"].append(_of_module(again, attention_output, sizes, everywhere, rounding))
    norm, unembedding = architecture.final_norm(root), architecture.unembedding(root)
    architecture.epsilon(norm)  # raises if it is unknown
    end = norm.input
    if parts is not None:
        pairs["block"].append(_of_block(*parts, end[kept.to(end.device)], rounding))
    dtype = unembedding.input.dtype
    coarse = coarsest(end, unembedding.input)
    unembedded = architecture.logits(unembedding(norm(end[:, -1]).to(dtype))).float().cpu()
    # The model's own logits, after any change to the unembedding's output.
    logits = root.output.logits
    allowed = torch.tensor(2 * rounding.module(coarse))  # a norm comes before each module
    pairs["again"] = [(error, allowed) for error in pairs["again"]]
    found: dict[str, Any] = {
        "pairs": {name: [(a.cpu(), b.cpu()) for a, b in both] for name, both in pairs.items()},
        "logits": logits[:, -1].float().cpu(),
        "end": end[:, -1].float().cpu(),
        "written": bool(torch.stack(written).max() > 0),
        "dtype": coarse,
        "unembedded": unembedded,
    }
    return found


def _pair(error: torch.Tensor, allowed: torch.Tensor, seen: torch.Tensor) -> Any:
    """Return the worst of errors (B, T, ...) at unmasked positions, and the allowed error there."""
    error, allowed = error[seen].flatten(), allowed.expand_as(error)[seen].flatten()
    strain = (error / allowed).nan_to_num(nan=torch.inf, posinf=torch.inf)
    at = strain.argmax()
    return error[at], allowed[at]


def _of_block(
    parts: list[torch.Tensor], dtype: torch.dtype, after: torch.Tensor, rounding: Rounding
) -> Any:
    """Compare the sum of a block's parts (n, d_model) with the next block's input."""
    stacked = torch.stack([part.to(after.device) for part in parts])
    dtype = max(dtype, after.dtype, key=roundoff)
    error = (stacked.sum(dim=0) - after.float()).abs() / _positive(stacked.abs().sum(dim=0))
    return error.amax(), torch.tensor(rounding.sum(dtype))


def _of_module(
    found: Float[torch.Tensor, "B T d_model"],
    expected: Float[torch.Tensor, "B T d_model"],
    size: Float[torch.Tensor, "B T d_model"],
    seen: torch.Tensor,
    rounding: Rounding,
) -> Any:
    """Compare vectors computed in two ways, relative to the largest element of each size vector."""
    largest = _positive(size.float().amax(dim=-1))
    error = (found.float() - expected.float()).abs().amax(dim=-1) / largest
    return error[seen].amax(), torch.tensor(rounding.module(expected.dtype))


def _again(
    architecture: Architecture,
    block: Any,
    residual: Float[torch.Tensor, "B T d_model"],
    projected: list[torch.Tensor],
    attention_write: Float[torch.Tensor, "B T d_model"],
    mlp_output: Float[torch.Tensor, "B T d_model"],
) -> Float[torch.Tensor, ""]:
    """Return the worst error when norms, projections and MLP are called as a sweep calls them.

    This detects interventions that act only on the model's own forward pass, such as nnsight edits.
    """
    normed = architecture.attention_input(block, residual)
    # After the split, because some models change the projections' outputs in place.
    again, own = (
        [*architecture.split(block, outputs), architecture.gate(block, outputs)]
        for outputs in ([call(module, normed) for module in architecture.qkv(block)], projected)
    )
    pairs = [(a, b) for a, b in zip(again, own, strict=True) if a is not None]
    middle = residual if architecture.parallel else residual + attention_write
    output = architecture.feed_forward(block, architecture.mlp_input(block, middle))
    pairs.append((output, mlp_output))
    errors = [
        (a.float() - b.float()).norm(dim=-1).amax() / _positive(b.float().norm(dim=-1).amax())
        for a, b in pairs
    ]
    return torch.stack(errors).amax()


def _positive(size: torch.Tensor) -> torch.Tensor:
    return size.clamp(min=torch.finfo(size.dtype).tiny)


def attend(
    architecture: Architecture,
    layer: int,
    query: Float[torch.Tensor, "B T H d_key"],
    key: Float[torch.Tensor, "B T K d_key"],
    value: Float[torch.Tensor, "B T K D"],
    scoring: tuple[Float[torch.Tensor, "#B H T"] | None, Float[torch.Tensor, " H"] | None],
    mask: Int[torch.Tensor, "B T"],
) -> tuple[
    Float[torch.Tensor, "B T H D"], Float[torch.Tensor, "B T H"], Float[torch.Tensor, "B T H"]
]:
    """Return recomputed z, mean norm of the attended values, and largest absolute score.

    `scoring` are the bias of each key and the heads' sinks.
    """
    per, (bias, sinks) = query.shape[2] // key.shape[2], scoring
    key, value = (x.repeat_interleave(per, dim=2).transpose(1, 2).float() for x in (key, value))
    scores = query.transpose(1, 2).float() @ key.mT * architecture.scaling(layer)
    scores = softcapped(scores, architecture.score_softcap)
    if bias is not None:
        scores = scores + bias[:, :, None]
    columns = torch.arange(mask.shape[1], device=scores.device)
    kept = mask.bool().to(scores.device)
    seen = columns <= columns[:, None]
    window, chunk = architecture.window(layer), architecture.chunk(layer)
    if window is not None:
        seen = seen & (columns[:, None] - columns < window)
    if chunk is not None:
        numbers = (kept.cumsum(dim=-1) - 1).div(chunk, rounding_mode="floor")
        seen = seen & (numbers[:, :, None] == numbers[:, None])
    seen = (seen & kept[:, None]) | (columns == columns[:, None])
    masked = scores.masked_fill(~seen[:, None], -torch.inf)
    weights = softmax(masked, None if sinks is None else sinks[:, None])
    length = (weights @ value.norm(dim=-1)[..., None])[..., 0]
    size = scores.masked_fill(~seen[:, None], 0).abs().amax(dim=-1)
    return (weights @ value).transpose(1, 2), length.transpose(1, 2), size.transpose(1, 2)
