"""How much memory a sweep takes, and how much of it fits at a time."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ..errors import InputError

if TYPE_CHECKING:
    from ..models import Model
    from .layout import Layout

SHARE = 0.5
"""Share of the free memory that a sweep takes where no budget is given."""

REMOTE_BUDGET = "2GiB"
"""What a sweep takes where no budget is given and the server's memory is not known."""

UNEMBED_BYTES = 1 << 29
"""Most bytes of logits held at a time when many vectors are unembedded."""

TOKENS_PER_CHUNK = 4096
"""Tokens of rows that are carried through the layers at a time; more gains nothing."""


class BudgetError(InputError):
    """A batch does not fit a memory budget."""


@dataclass
class Fit:
    """What fits a budget at a time.

    Attributes
    ----------
    rows
        Rows that are carried through the layers.
    vectors
        Vectors that are unembedded to the whole vocabulary.
    """

    rows: int
    vectors: int


def what_fits(
    model: Model, layout: Layout, width: int, budget: int | str | None, logprobs: bool
) -> Fit:
    """How much of a sweep of a batch fits a memory budget at a time.

    Counted are the forward, what is kept of it, the rows on their way, and at the end
    either the rows' margins or the logits of some of them.

    Raises
    ------
    BudgetError
        If not one row fits, or not one vector's logits.
    """
    source, earlier = layout.source.own, layout.earlier.own
    n_prompts, (n_packs, n_changed) = len(layout.prompt.own), source.shape
    sizes = (n_packs, n_changed, earlier.shape[1])
    fixed = forward_bytes(model, n_prompts, width) + clean_bytes(model, *sizes)
    each, at_end = row_bytes(model, *sizes), end_bytes(model, n_prompts)
    vector = logit_bytes(model)
    smallest = fixed + max(each, at_end + vector * logprobs)
    unknown = budget is None and model.remote
    given = as_bytes(REMOTE_BUDGET if unknown else budget, model.devices)
    if smallest > given:
        raise BudgetError(
            f"memory_budget={budget!r} is too small for a batch of {n_prompts} prompts: "
            f"its smallest is {readable(smallest)} ({smallest} bytes); give that, or a "
            "smaller batch_size"
        )
    rows = min(
        (given - fixed) // each,
        (given - fixed - vector * logprobs) // at_end,
        max(1, TOKENS_PER_CHUNK // (n_packs * n_changed)),
    )
    left = given - fixed - rows * at_end
    return Fit(rows, max(1, min(UNEMBED_BYTES, left) // vector))


def as_bytes(
    budget: int | str | None, devices: Iterable[torch.device], name: str = "memory_budget"
) -> int:
    """A memory budget in bytes; by default a share of what is free on the fullest device.

    Raises
    ------
    InputError
        If it is no positive number of bytes and no text like "2GiB".
    """
    from accelerate.utils.modeling import convert_file_size_to_int

    if budget is None:
        return int(SHARE * min(map(free_bytes, devices)))
    wrong = InputError(f"{name}={budget!r} must be a number of bytes, or like '2GiB'")
    if isinstance(budget, bool) or not isinstance(budget, (int, str)):
        raise wrong
    try:
        plain = str(budget).isdigit()
        found = int(budget) if plain else int(convert_file_size_to_int(budget))
    except (ValueError, OverflowError):
        raise wrong from None
    if found <= 0:
        raise wrong
    return found


def free_bytes(device: torch.device) -> int:
    """Memory that is free on a device."""
    if device.type == "cuda":
        # What torch holds without using it is free for tensors, too.
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0] + unused)
    import psutil

    return int(psutil.virtual_memory().available)


def readable(n_bytes: float) -> str:
    """Bytes in MiB or GiB."""
    mib = n_bytes / 2**20
    return f"{mib / 1024:.2f}GiB" if mib >= 1024 else f"{mib:.1f}MiB"


def clean_bytes(model: Model, n_packs: int, n_changed: int, n_earlier: int) -> int:
    """What is kept of all layers of the clean run while rows go through them in chunks."""
    a = model.architecture
    of_changed = n_changed * (a.d_model * (2 if a.parallel else 1) + a.n_heads * a.d_head)
    of_earlier = n_earlier * 2 * a.n_kv_heads * a.d_head
    return model.n_layers * n_packs * (of_changed + of_earlier) * model.dtype.itemsize


def row_bytes(model: Model, n_packs: int, n_changed: int, n_earlier: int) -> int:
    """What one row takes at its largest, on its way through a block.

    Counts what is held at a time in the attention and in the MLP, whichever is more.
    """
    a, size = model.architecture, model.dtype.itemsize
    of_heads, of_keys = a.n_heads * a.d_head, a.n_kv_heads * a.d_head
    seen = n_earlier + n_changed
    in_attention = size * (2 * a.d_model + 5 * of_heads + 5 * of_keys)
    if n_changed == 1:
        in_attention += 3 * 4 * a.n_heads * seen
    else:
        copies = 2 if n_earlier else 0
        in_attention += size * copies * of_keys * seen // n_changed + 5 * seen
    in_mlp = size * (4 * a.d_model + of_heads + 4 * a.d_mlp)
    return n_packs * n_changed * max(in_attention, in_mlp)


def forward_bytes(model: Model, n_prompts: int, width: int) -> int:
    """What the forward takes: its largest block, scores perhaps whole, and its logits."""
    scores = 0
    if model.attention_kernel in (None, "eager"):
        scores = 3 * n_prompts * model.n_heads * width**2 * max(4, model.dtype.itemsize)
    return row_bytes(model, n_prompts, width, 0) + scores + n_prompts * logit_bytes(model)


def end_bytes(model: Model, n_prompts: int) -> int:
    """What a row takes when it has left the last layer, and while it is normed in float32."""
    return n_prompts * model.d_model * (4 * model.dtype.itemsize + 3 * 4)


def logit_bytes(model: Model) -> int:
    """What a vector's logits take; a second time where they are not float32 at once."""
    size = model.dtype.itemsize
    return model.architecture.vocabulary_size * (4 if size == 4 else 4 + size)
