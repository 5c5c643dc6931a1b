"""Proof, at load, that a model is read and edited right.

Two short prompts of unequal length are run three times: as they are, with every head's
output written back unchanged, and with every head's output halved. From the first run
the parts are put together again and compared with what the model computed itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import nnsight
import torch
from jaxtyping import Float, Int

from ..errors import CheckError
from .architecture import call

if TYPE_CHECKING:
    from .architecture import Architecture
    from .model import Model

TOLERANCES = {"float64": 1e-6, "float32": 1e-4, "float16": 2e-2, "bfloat16": 6e-2}
"""Largest max |a - b| / max |b| that is accepted, by dtype."""

QUANTIZED_TOLERANCES = {"int8": 8e-2, "nf4": 6e-2}
"""The same for quantized models: int8 rounds activations row by row, so that parts do not
sum to the whole exactly, and nf4 computes in the compute dtype."""

IDENTITIES = (
    "the heads' outputs do not sum to the attention output",
    "recomputed attention does not give the heads' outputs",
    "residual stream, attention and MLP do not sum to the block's output",
    "halving the heads' outputs does not reach the output projection",
)


def tolerance(dtype: str, quantization: str | None = None) -> float:
    """What the check accepts for a dtype and a quantization."""
    by_dtype = TOLERANCES[dtype.removeprefix("torch.")]
    return max(by_dtype, QUANTIZED_TOLERANCES.get(quantization or "", 0.0))


def check_model(model: Model) -> dict[str, float]:
    """Prove the identities that every measure rests on.

    Parameters
    ----------
    model
        A loaded model.

    Returns
    -------
    dict
        For each identity the largest error found over the layers, relative to the largest
        element of what the model itself computed.

    Raises
    ------
    CheckError
        Naming the identity, the layer, the error and the tolerance.
    """
    plain, same, halved = _runs(model)
    limit = tolerance(str(plain["dtype"]), model.quantization)
    worst: dict[str, float] = {}
    for name, errors in zip(
        IDENTITIES,
        (plain["sum"], plain["attention"], plain["block"], halved["edit"]),
        strict=True,
    ):
        for layer, error in enumerate(errors.tolist()):
            if not error <= limit:
                raise CheckError(
                    f"{model.name}, layer {layer}: {name} (error {error:.2g}, at most {limit:.2g} "
                    f"is accepted). The adapter {type(model.architecture).__name__} does not fit "
                    "this model; load with check=False only to find out why"
                )
        worst[name] = float(errors.max())
    unembedded = _error(plain["unembedded"], plain["logits"])
    if not unembedded <= limit:
        raise CheckError(
            f"{model.name}: norm and unembedding of the last residual stream do not give the "
            f"logits (error {unembedded:.2g}, at most {limit:.2g} is accepted)"
        )
    moved = _error(same["logits"], plain["logits"])
    if not moved <= limit:
        raise CheckError(
            f"{model.name}: writing the heads' outputs back unchanged moves the logits by "
            f"{moved:.2g} (at most {limit:.2g} is accepted)"
        )
    # Norm and unembedding were shown to make the logits of this stream.
    if plain["written"] and torch.equal(halved["end"], plain["end"]):
        raise CheckError(
            f"{model.name}: editing the heads' outputs does not move the last residual stream"
        )
    return {**worst, "unembedding": unembedded, "no-op edit": moved}


def _prompts(model: Model) -> tuple[Int[torch.Tensor, "2 7"], Int[torch.Tensor, "2 7"]]:
    """Token ids and mask of two prompts, 7 and 4 tokens long, left-padded."""
    vocabulary = model.architecture.vocabulary_size
    ids = torch.arange(14).view(2, 7) * 97 % max(vocabulary - 11, 1) + min(10, vocabulary - 1)
    ids = ids % vocabulary
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    return ids.to(model.device), mask.to(model.device)


def _runs(model: Model) -> list[dict[str, Any]]:
    """The prompts as they are, with heads written back unchanged, and halved; one session."""
    architecture, root = model.architecture, model.traced
    ids, mask = _prompts(model)
    positions = (mask.cumsum(dim=-1) - 1).clamp(min=0)
    inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
    where = {"remote": model.remote} if model.remote else {}
    with root.session(**where):
        found = nnsight.save([])
        with torch.no_grad():
            for factor in (None, 1.0, 0.5):
                with root.trace(**inputs, use_cache=False):
                    found.append(_walk(architecture, root, mask, factor))
    return list(found)


def _walk(
    architecture: Architecture, root: Any, mask: torch.Tensor, factor: float | None
) -> dict[str, Any]:
    """Errors of every layer, the logits and the dtype; inside a trace."""
    errors: dict[str, list[torch.Tensor]] = {"sum": [], "attention": [], "block": [], "edit": []}
    written = []
    kept = mask.bool()
    whole = None
    for index, block in enumerate(architecture.layers(root)):
        residual = block.input
        if whole is not None:
            errors["block"].append(_relative(whole, residual[kept.to(residual.device)]))
        tables = architecture.rotary_tables(architecture.attention(block))
        projected = [module.output for module in architecture.qkv(block)]
        projection = architecture.projection(block)
        z = projection.input
        if factor is not None:
            z = z * factor
            projection.input = z
        attention_output = projection.output
        written.append(attention_output[:, -1].abs().max().float().cpu())
        mlp_output = architecture.mlp(block).output
        if factor is None:
            q, k, v = architecture.split(block, projected)
            heads = z.unflatten(-1, (architecture.n_heads, -1))
            again = attend(architecture, index, q, k, v, tables, mask)
            seen = kept.to(z.device)
            errors["attention"].append(_relative(again[seen], heads[seen]))
            alone = torch.eye(heads.shape[2], dtype=z.dtype, device=z.device)[
                :, None, None, :, None
            ]
            nothing = projection(torch.zeros_like(z[:1, :1]))
            parts = call(projection, (heads * alone).flatten(-2)) - nothing
            errors["sum"].append(_relative(parts.float().sum(dim=0) + nothing, attention_output))
            # Compared with what the next layer reads, not with the block's own output:
            # nothing may come in between.
            # The residual stream is read before accelerate brings it to the layer's device.
            residual = residual.to(z.device)
            whole = (residual.float() + attention_output.float() + mlp_output.float())[seen]
        else:
            errors["edit"].append(_relative(projection(z), attention_output))
    _ = architecture.norm_epsilon  # a model for which it is not known is refused here
    norm, unembedding = architecture.final_norm(root), architecture.unembedding(root)
    end = norm.input
    if whole is not None:
        errors["block"].append(_relative(whole, end[kept.to(end.device)]))
    unembedded = unembedding(norm(end[:, -1])).float().cpu()
    # The model's own answer, after whatever it does to the unembedding's output.
    logits = root.output.logits
    found: dict[str, Any] = {k: torch.stack(v).cpu() for k, v in errors.items() if v}
    found["logits"] = logits[:, -1].float().cpu()
    found["end"] = end[:, -1].float().cpu()
    found["written"] = bool(torch.stack(written).max() > 0)
    found["dtype"] = str(end.dtype)
    found["unembedded"] = unembedded
    return found


def attend(
    architecture: Architecture,
    layer: int,
    query: Float[torch.Tensor, "B T H D"],
    key: Float[torch.Tensor, "B T K D"],
    value: Float[torch.Tensor, "B T K D"],
    tables: tuple[Float[torch.Tensor, "#B T rotated"], Float[torch.Tensor, "#B T rotated"]] | None,
    mask: Int[torch.Tensor, "B T"],
) -> Float[torch.Tensor, "B T H D"]:
    """z (B, T, H, d_head) of every position, recomputed from queries, keys and values."""
    if tables is not None:
        cos, sin = (t.unsqueeze(-2).to(query.dtype) for t in tables)
        query, key = (architecture.rotate(x, cos, sin) for x in (query, key))
    per = query.shape[2] // key.shape[2]
    key, value = (x.repeat_interleave(per, dim=2).transpose(1, 2) for x in (key, value))
    scores = query.transpose(1, 2).float() @ key.float().mT * architecture.scaling(layer)
    columns = torch.arange(mask.shape[1], device=scores.device)
    seen = columns <= columns[:, None]
    window = architecture.window(layer)
    if window is not None:
        seen = seen & (columns[:, None] - columns < window)
    seen = (seen & mask.bool().to(scores.device)[:, None]) | (columns == columns[:, None])
    weights = scores.masked_fill(~seen[:, None], -torch.inf).softmax(dim=-1)
    return (weights.to(value.dtype) @ value).transpose(1, 2)


def _relative(
    found: Float[torch.Tensor, "*shape"], expected: Float[torch.Tensor, "*shape"]
) -> Float[torch.Tensor, ""]:
    """Largest difference over the largest expected element, as a tensor.

    Where nothing but zeros is expected, as in a layer whose heads write nothing, any
    difference is too large.
    """
    difference = (found.float().to(expected.device) - expected.float()).abs().max()
    scale = expected.float().abs().max()
    return (difference / scale.clamp(min=torch.finfo(scale.dtype).tiny)).cpu()


def _error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float(_relative(found, expected))
