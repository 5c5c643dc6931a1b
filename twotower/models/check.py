"""Check at load time that a model is read and edited correctly.

Prompts of unequal length run three times: unedited, with every head's output written back
unchanged, and with every other element of the heads' outputs halved. From the first run, the check
sums the parts of each block and compares the sums with the model's own values. It also calls each
module again on its own input. The allowed differences are those of rounding (`rounding.py`).

Attention may change at a length that a short prompt does not reach. If the configuration names
such a length, the check also runs on a small random model of the same kind (`lengths.py`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import nnsight
import torch

from ..errors import CheckError
from ..results.findings import Finding
from .check_walk import check_walk
from .rounding import Rounding

if TYPE_CHECKING:
    from .model import Model

IDENTITIES = {
    "sum": "the heads' outputs do not sum to the attention output",
    "attention": "recomputed attention does not give the heads' outputs",
    "block": "residual stream, attention and MLP do not sum to the block's output",
    "again": "modules called again on the same input do not give the outputs of the forward pass",
    "edit": "an edit of the heads' outputs does not reach the output projection",
    "unembedding": "final norm and unembedding of the last residual stream do not give the logits",
    "no-op edit": "writing the heads' outputs back unchanged changes the logits",
}
"""Message for each identity that does not hold."""

SHORT = (7, 4)
"""Prompt lengths, in tokens."""


def prompt_lengths(longest: int) -> tuple[int, int]:
    """Return prompt lengths beyond a length at which attention changes, and beyond twice of it.

    `SHORT` for 0, which means that there is none.
    """
    return (2 * longest + 5, longest + 2) if longest else SHORT


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
    plain, same, halved = runs(model, lengths)
    finite = plain["logits"].isfinite().all(dim=-1)
    if finite.any() and not finite.all():
        raise CheckError(
            f"{model.name}: the model's own logits of one of two short prompts, of which one is "
            f"padded, are not finite in {str(plain['dtype']).removeprefix('torch.')} with the "
            f"attention kernel {model.attention_kernel!r}; load it with another dtype=, or another "
            "kernel, such as attn_implementation='sdpa'"
        )
    found = {**plain["pairs"], "edit": halved["pairs"]["edit"]}
    rounding = Rounding.of(model)
    dtype: torch.dtype = plain["dtype"]
    size = plain["logits"].abs().amax()
    for name, other in (("unembedding", plain["unembedded"]), ("no-op edit", same["logits"])):
        error = (other - plain["logits"]).abs().amax() / size
        found[name] = [(None, error, torch.tensor(rounding.module(dtype)))]
    worst: dict[str, Finding] = {}
    for name in IDENTITIES:
        for layer, error, allowed in found[name]:
            finding = Finding(float(error), float(allowed))
            if not finding.strain <= 1:
                place = "" if layer is None else f", layer {layer}"
                raise CheckError(
                    f"{model.name}{place}: {IDENTITIES[name]} (error {finding.error:.2g}, at most "
                    f"{finding.allowed:.2g} is accepted). {_cause(model, finding)}"
                )
            if name not in worst or finding.strain > worst[name].strain:
                worst[name] = finding
    # The checks above showed that norm and unembedding turn this stream into the logits.
    if plain["written"] and torch.equal(halved["end"], plain["end"]):
        raise CheckError(
            f"{model.name}: editing the heads' outputs does not change the last residual stream"
        )
    return worst


def _cause(model: Model, finding: Finding) -> str:
    if math.isnan(finding.error):
        return (
            f"Numbers overflow in {str(model.dtype).removeprefix('torch.')}; load the model with "
            "dtype='bfloat16' or 'float32'"
        )
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


def runs(
    model: Model, lengths: Sequence[int], factors: Sequence[float | None] = (None, 1.0, 0.5)
) -> list[dict[str, Any]]:
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
            for factor in factors:
                with root.trace(**inputs, **options):
                    found.append(check_walk(architecture, root, mask, factor, rounding))
    return list(found)
