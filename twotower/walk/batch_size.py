"""Batch size: found automatically, remembered, and halved when memory runs out.

On a CPU a batch has about a thousand tokens; more is hardly faster. On a GPU the first batch has
the same size. Its memory use is measured, and the next batches fill the device.
"""

from __future__ import annotations

import logging
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from ..checks import whole
from ..errors import InputError
from .batch import Batch, make_batch, ordered
from .memory import BudgetError, free_bytes
from .readouts import fits, labels_at_once

if TYPE_CHECKING:
    from ..models import Model
    from ..prompts import Prompts

TOKENS_PER_BATCH = 1024
"""Tokens, with padding, of a batch on a CPU, and of the first batch on a GPU."""

SHARE = 0.8
"""Share of a GPU's free memory that a batch may fill."""

GROWTH = 16
"""Largest growth factor from one batch to the next."""

log = logging.getLogger(__name__)


@dataclass
class Found:
    """Batch size found for one kind of measurement.

    Attributes
    ----------
    tokens
        Largest number of tokens in a batch, with padding.
    ceiling
        Smallest number of tokens at which memory ran out; None if it never did.
    halvings
        Number of times that memory ran out.
    """

    tokens: int = TOKENS_PER_BATCH
    ceiling: int | None = None
    halvings: int = 0

    def ran_out(self, tokens: int) -> None:
        """Reduce the size after memory ran out on a number of tokens."""
        self.ceiling = min(tokens, self.ceiling or tokens)
        self.tokens = max(1, tokens // 2)
        self.halvings += 1

    def succeeded(self, tokens: int, headroom: float | None) -> None:
        """Adapt the size after a batch succeeded, if `headroom` times its memory is free.

        Batches below half the allowed size are ignored, because part of the memory that they
        take does not depend on size.
        """
        if headroom is None or 2 * tokens < self.tokens:
            return
        self.tokens = max(1, int(tokens * min(SHARE * headroom, GROWTH)))
        if self.ceiling is not None:
            self.tokens = max(1, min(self.tokens, self.ceiling // 2))


class Meter:
    """Memory that a batch takes on the model's GPUs."""

    def __init__(self, model: Model) -> None:
        devices = () if model.remote else model.devices
        self.devices = [x for x in devices if x.type == "cuda"]
        self.before: dict[torch.device, int] = {}

    def start(self) -> None:
        """Start measuring, before a batch."""
        for device in self.devices:
            torch.cuda.reset_peak_memory_stats(device)
            self.before[device] = torch.cuda.memory_allocated(device)

    def headroom(self) -> float | None:
        """Return the free memory over the memory taken since `start`; None without a GPU."""
        times = []
        for device, before in self.before.items():
            taken = torch.cuda.max_memory_allocated(device) - before
            times.append(free_bytes(device) / max(taken, 1))
        return min(times) if times else None


class Batches:
    """Batches of prompts, grouped by length to save padding.

    Process each batch inside `with batches.attempt():`. If memory runs out there, the same
    prompts come again in smaller batches.

    Parameters
    ----------
    model, prompts
        Model and prompts to measure.
    batch_size
        Prompts in a batch, fewer if memory runs out; None to find a size.
    columns
        (prompt, K) columns of per-position results to keep; None for all.
    shared
        Whether to put prompts with the same beginning together.
    kind
        Key under which the batch size found is remembered.

    Raises
    ------
    InputError
        If `batch_size` is not a whole number of 1 or more, prompts are too long, or memory
        runs out on a single prompt.
    """

    def __init__(
        self,
        model: Model,
        prompts: Prompts,
        batch_size: int | None = None,
        columns: np.ndarray | None = None,
        shared: bool = False,
        kind: Hashable = None,
    ) -> None:
        self.most = None if batch_size is None else whole("batch_size", batch_size, 1)
        self.model, self.prompts, self.columns = model, prompts, columns
        self.left = ordered(model, prompts, shared)
        # The length belongs to the key, because attention's share of the memory grows with it.
        width = prompts.n_positions if columns is None else columns.shape[1]
        key = ("batch size", kind, shared, *(n.bit_length() for n in (prompts.n_positions, width)))
        self.found: Found = Found()
        if self.most is None:
            self.found = model.cache.setdefault(key, self.found)
        self.meter = Meter(model)
        # Few, because recorders take them along to a server.
        self.n_coming = 0 if fits(model, prompts) else labels_at_once(model)
        self.n = 0
        self.error: str | None = None

    def __iter__(self) -> Iterator[Batch]:
        while len(self.left):
            lengths = np.maximum.accumulate(self.prompts.lengths[self.left])
            padded = lengths * np.arange(1, len(lengths) + 1)
            n = self.most or max(1, int((padded <= self.found.tokens).sum()))
            n = self.n = min(n, len(padded))
            self.error = None
            now, then = np.split(self.left, [n])
            yield make_batch(self.model, self.prompts, now, self.columns, then[: self.n_coming])
            if self.error is None:
                self.left = self.left[n:]
                self.found.succeeded(int(padded[n - 1]), self.meter.headroom())
            else:
                self._halve(n, int(padded[n - 1]))

    @contextmanager
    def attempt(self) -> Iterator[None]:
        """Return a context for processing a batch, which handles running out of memory."""
        self.meter.start()
        try:
            yield
        except BudgetError as error:
            if self.most is not None or self.n == 1:
                raise
            self.error = str(error)
        except Exception as error:
            if not out_of_memory(error):
                raise
            self.error = str(error)

    def _halve(self, n: int, tokens: int) -> None:
        """Free memory after it ran out on n prompts, and halve the batch size.

        Must run after the exception is dropped, because its traceback keeps tensors alive.
        """
        from accelerate.utils.memory import clear_device_cache

        clear_device_cache(garbage_collection=True)
        if n == 1:
            raise InputError(
                f"memory ran out on a single prompt of {tokens} tokens: take shorter prompts, "
                "keep='labels' if the measure has that argument, a memory_budget=, or load the "
                f"model with quantization= or in bfloat16 ({self.error})"
            )
        self.found.ran_out(tokens)
        if self.most is not None:
            self.most = n // 2
        log.info("memory ran out on %d prompts (%d tokens); going on with half", n, tokens)


def out_of_memory(error: Exception) -> bool:
    """Return whether an error means that memory ran out, on a GPU, the CPU or a server."""
    from accelerate.utils.memory import should_reduce_batch_size
    from nnsight.intervention.backends.remote import RemoteError

    if isinstance(error, RemoteError):
        return "out of memory" in str(error).lower()
    return isinstance(error, torch.OutOfMemoryError) or should_reduce_batch_size(error)
