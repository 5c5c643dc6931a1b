"""Memory: free bytes of a device, and bytes that forwards and rows need."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ..errors import InputError

if TYPE_CHECKING:
    from ..models import Model

UNEMBED_BYTES = 1 << 29
"""Most bytes of logits held at a time when many vectors are unembedded."""


FEW = 8
"""Changed positions of a row up to which rows share the clean keys and hold their scores; with
more, copies of the keys for torch's kernels are faster. (Measured at 95 tokens: 2 to 10 times as
fast up to 5 positions, equal at 8 with 3 key heads.)"""


class BudgetError(InputError):
    """A batch does not fit a memory budget."""


def free_bytes(device: torch.device) -> int:
    """Return the free bytes of a device."""
    if device.type == "cuda":
        # Memory that torch has reserved but does not use is free for tensors too.
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0] + unused)
    import psutil

    return int(psutil.virtual_memory().available)


def readable(n_bytes: float) -> str:
    """Return a number of bytes as text, in MiB or GiB."""
    mib = n_bytes / 2**20
    return f"{mib / 1024:.2f}GiB" if mib >= 1024 else f"{mib:.1f}MiB"


def row_bytes(model: Model, n_packs: int, n_changed: int, n_earlier: int) -> int:
    """Return the peak bytes of one row in a block, in attention or in the MLP."""
    a, size = model.architecture, model.dtype.itemsize
    width = max(a.d_head, a.d_key)
    of_heads, of_keys = a.n_heads * width, a.n_kv_heads * width
    seen = n_earlier + n_changed
    in_attention = size * (2 * a.d_model + 7 * of_heads + 7 * of_keys)
    if n_changed <= FEW or not a.plain_scores:
        in_attention += 4 * (2 * of_heads + 2 * of_keys + 3 * a.n_heads * seen)
    if n_changed > FEW:
        copies = 2 if n_earlier else 0
        in_attention += size * copies * of_keys * seen // n_changed + 5 * seen
    in_mlp = size * (4 * a.d_model + of_heads + 4 * a.d_mlp + _experts(model))
    return n_packs * n_changed * max(in_attention, in_mlp)


def _experts(model: Model) -> int:
    """Return the numbers that the chosen experts of a token take: inputs, gates and outputs."""
    config = model.architecture.config
    chosen = int(getattr(config, "num_experts_per_tok", None) or 0)
    width = int(getattr(config, "moe_intermediate_size", None) or model.architecture.d_mlp)
    return chosen * (4 * model.d_model + 5 * width)


def forward_bytes(model: Model, n_prompts: int, width: int) -> int:
    """Return the bytes of a forward: one block, full scores for eager attention, and logits."""
    scores = 0
    if model.attention_kernel in (None, "eager"):
        scores = 3 * n_prompts * model.n_heads * width**2 * max(4, model.dtype.itemsize)
    return row_bytes(model, n_prompts, width, 0) + scores + n_prompts * logit_bytes(model)


def logit_bytes(model: Model) -> int:
    """Return the bytes of a vector's logits; dtypes below float32 need a float32 copy."""
    size = model.dtype.itemsize
    return model.architecture.vocabulary_size * (4 if size == 4 else 4 + size)
