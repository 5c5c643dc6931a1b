"""Number of counterfactual rows of a sweep that fit into memory at a time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..checks import positive_bytes
from ..models.rounding import Rounding
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
from .mixers import rows_at_once, state_bytes

if TYPE_CHECKING:
    from ..models import Model
    from .layout import Layout

MIXER_STATES = 6
"""States that a mixer holds for each row at a time: copies, products and sums. Measured with its
other tensors, on models 768 wide: 3.4 (Kimi's delta rule) to 5.6 (Mamba 2)."""

SHARE = 0.5
"""Share of the free memory that a sweep uses if no budget is given."""

REMOTE_BUDGET = "2GiB"
"""Budget of a sweep on a server, whose free memory is unknown, if none is given."""

EDGE_TOKENS = 2048
"""Largest number of positions whose keys or values are computed at a time; more is not faster."""

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
    reads
        Sources of edges whose targets' outputs are computed together.
    """

    rows: int
    vectors: int
    reads: int = 1


def what_fits(model: Model, layout: Layout, width: int, logprobs: bool, more: int = 0) -> Fit:
    """Return how much of a batch's sweep fits the option `memory_budget` at a time.

    Counts the forward, the tensors kept from it, the rows in the layers, the rows after the last
    layer, and the logits of the vectors that are unembedded at a time; and `more` bytes.

    Raises
    ------
    BudgetError
        If not even one row fits, or not even one vector's logits.
    """
    source, earlier = layout.source.own, layout.earlier.own
    n_prompts, (n_packs, n_changed) = len(layout.prompt.own), source.shape
    sizes = (n_packs, n_changed, earlier.shape[1])
    fixed = forward_bytes(model, n_prompts, width) + clean_bytes(model, *sizes)
    fixed += mixer_bytes(model, *sizes) + more
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


def edges_fit(
    model: Model,
    layout: Layout,
    width: int,
    columns: int,
    n_edges: int,
    logprobs: bool,
    together: bool = False,
) -> Fit:
    """Return how much of a batch's edges fits the option `memory_budget` at a time.

    Parameters
    ----------
    model, layout, width
        Model, layout and number of positions of the batch.
    columns
        Number of positions at which sources' writes are kept.
    n_edges
        Number of edges.
    logprobs
        Whether log-probabilities are measured.
    together
        Whether several sources are changed together (`Writes`).
    """
    a, size = model.architecture, model.dtype.itemsize
    follows = together or Rounding().is_coarse(model.dtype)
    n_packs, n_changed = layout.source.own.shape
    seen = n_changed + layout.earlier.own.shape[1]
    of_keys = a.n_kv_heads * (a.d_key + a.d_head)
    # Of each layer: z and writes, the stream that is read, queries, keys and values.
    kept = columns * 6 * a.d_model + seen * of_keys + n_changed * a.n_heads * a.d_key
    kept = n_packs * (model.n_layers * kept * size + n_edges * n_changed * a.d_head * size)
    # The stream's rounding, and products of all heads; float64 sums of the stream.
    rounding = 4 * follows + 8 * together
    kept += n_packs * columns * a.d_model * (model.n_layers * rounding + 24 * follows)
    read = columns * (4 * a.d_model * (8 if together else 4) + 3 * of_keys * size)
    read += seen * (3 * of_keys * size + 3 * 4 * a.n_heads * n_changed)
    reads = max(1, EDGE_TOKENS // (n_packs * columns))
    fit = what_fits(model, layout, width, logprobs, kept + n_packs * read)
    free = fit.rows * row_bytes(model, n_packs, n_changed, seen - n_changed)
    reads = max(1, min(reads, free // (n_packs * read)))
    return Fit(fit.rows, fit.vectors, reads)


def clean_bytes(model: Model, n_packs: int, n_changed: int, n_earlier: int) -> int:
    """Return the bytes kept from all layers of the clean run while chunks of rows pass them."""
    a, size = model.architecture, model.dtype.itemsize
    of_changed = n_changed * (a.d_model * (2 if a.parallel else 1) + a.n_heads * a.d_head)
    of_earlier = n_earlier * 2 * a.n_kv_heads * a.d_head
    columns, state = _mixing(model, n_changed, n_earlier)
    of_mixer = (n_changed + columns) * a.d_model * size + state
    of_layers = model.n_layers * (of_changed + of_earlier) * size
    return n_packs * (of_layers + _n_mixers(model) * of_mixer)


def mixer_bytes(model: Model, n_packs: int, n_changed: int, n_earlier: int) -> int:
    """Return the bytes of the rows that a mixer takes at a time; 0 without mixers."""
    if not _n_mixers(model):
        return 0
    a = model.architecture
    columns, state = _mixing(model, n_changed, n_earlier)
    n_rows = rows_at_once(n_packs * columns, n_packs * state)
    of_token = (6 * a.d_model + 2 * a.d_mlp) * max(4, model.dtype.itemsize)
    return n_packs * n_rows * (columns * of_token + MIXER_STATES * state)


def _n_mixers(model: Model) -> int:
    """Return the number of layers with a mixer."""
    return sum(map(model.architecture.mixes, range(model.n_layers)))


def _mixing(model: Model, n_changed: int, n_earlier: int) -> tuple[int, int]:
    """Return the tokens that a row passes to a mixer, and the bytes of the state before them."""
    state = state_bytes(model) if n_changed == 1 and n_earlier else 0
    return (n_changed if state else n_changed + n_earlier), state


def end_bytes(model: Model, n_prompts: int) -> int:
    """Return the bytes of a row after the last layer, including its final norm in float32."""
    return n_prompts * model.d_model * (4 * model.dtype.itemsize + 3 * 4)
