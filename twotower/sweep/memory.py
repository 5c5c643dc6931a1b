"""Number of counterfactual rows of a sweep that fit into memory at a time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..checks import positive_bytes
from ..options import option
from ..walk.memory import (
    UNEMBED_BYTES,
    BudgetError,
    forward_bytes,
    free_bytes,
    logit_bytes,
    readable,
    row_bytes,
)

if TYPE_CHECKING:
    from ..models import Model
    from .layout import Layout

MIXER_TOKENS = 4096
"""Tokens that a mixer of positions takes at a time."""

SHARE = 0.5
"""Share of the free memory that a sweep uses if no budget is given."""

REMOTE_BUDGET = "2GiB"
"""Budget of a sweep on a server, whose free memory is unknown, if none is given."""

TOKENS_PER_CHUNK = 4096
"""Largest number of row positions in a chunk; more is not faster."""


@dataclass
class Fit:
    """Amounts that fit a memory budget at a time.

    Attributes
    ----------
    rows
        Rows in a chunk that passes through the layers.
    vectors
        Vectors to unembed to the whole vocabulary.
    """

    rows: int
    vectors: int


def what_fits(model: Model, layout: Layout, width: int, logprobs: bool) -> Fit:
    """Return how much of a batch's sweep fits the option `memory_budget` at a time.

    Counts the forward, the tensors kept from it, the rows in the layers, the rows after the last
    layer, and the logits of the vectors that are unembedded at a time.

    Raises
    ------
    BudgetError
        If not even one row fits, or not even one vector's logits.
    """
    source, earlier = layout.source.own, layout.earlier.own
    n_prompts, (n_packs, n_changed) = len(layout.prompt.own), source.shape
    sizes = (n_packs, n_changed, earlier.shape[1])
    fixed = forward_bytes(model, n_prompts, width) + clean_bytes(model, *sizes)
    if any(map(model.architecture.mixes, range(model.n_layers))):
        fixed += mixer_bytes(model, n_packs * width)
    each, at_end = row_bytes(model, *sizes), end_bytes(model, n_prompts)
    vector = logit_bytes(model)
    smallest = fixed + max(each, at_end + vector * logprobs)
    budget = option("memory_budget")
    if budget is not None or model.remote:
        given = positive_bytes("memory_budget", budget or REMOTE_BUDGET)
    else:
        given = int(SHARE * min(map(free_bytes, model.devices)))
    if smallest > given:
        raise BudgetError(
            f"memory_budget={budget!r} is too small for a batch of {n_prompts} prompts: "
            f"it needs at least {readable(smallest)} ({smallest} bytes); give that, or a "
            "smaller batch_size"
        )
    rows = min(
        (given - fixed) // each,
        (given - fixed - vector * logprobs) // at_end,
        max(1, TOKENS_PER_CHUNK // (n_packs * n_changed)),
    )
    left = given - fixed - rows * at_end
    return Fit(rows, max(1, min(UNEMBED_BYTES, left) // vector))


def clean_bytes(model: Model, n_packs: int, n_changed: int, n_earlier: int) -> int:
    """Return the bytes kept from all layers of the clean run while chunks of rows pass them."""
    a = model.architecture
    of_changed = n_changed * (a.d_model * (2 if a.parallel else 1) + a.n_heads * a.d_head)
    of_earlier = n_earlier * 2 * a.n_kv_heads * a.d_head
    return model.n_layers * n_packs * (of_changed + of_earlier) * model.dtype.itemsize


def mixer_bytes(model: Model, tokens: int) -> int:
    """Return the bytes of the sequences that a mixer takes at a time, at least one of `tokens`."""
    a = model.architecture
    of_token = 6 * a.d_model + 2 * a.d_mlp
    return max(MIXER_TOKENS, tokens) * of_token * max(4, model.dtype.itemsize)


def end_bytes(model: Model, n_prompts: int) -> int:
    """Return the bytes of a row after the last layer, including its final norm in float32."""
    return n_prompts * model.d_model * (4 * model.dtype.itemsize + 3 * 4)
