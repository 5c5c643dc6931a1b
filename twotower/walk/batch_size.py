"""How many prompts go into a batch: found, remembered, and halved where memory runs out.

On a processor a batch has about a thousand tokens; more gains little. On a GPU the first
batch is as careful, what it took is measured, and the next ones fill the device.
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

if TYPE_CHECKING:
    from ..models import Model
    from ..prompts import Prompts

TOKENS_PER_BATCH = 1024
"""Padded tokens of a batch on a processor, and of the first one on a GPU."""

SHARE = 0.8
"""Share of a GPU's free memory that batches are to fill."""

GROWTH = 16
"""How many times larger than the one before a batch may be."""

log = logging.getLogger(__name__)


@dataclass
class Found:
    """What is known of the batches of one kind of measurement.

    Attributes
    ----------
    tokens
        Padded tokens that a batch may have.
    ceiling
        Fewest at which memory ran out; None if it never did.
    halvings
        How often it did.
    """

    tokens: int = TOKENS_PER_BATCH
    ceiling: int | None = None
    halvings: int = 0

    def ran_out(self, tokens: int) -> None:
        """Memory ran out on so many padded tokens."""
        self.ceiling = min(tokens, self.ceiling or tokens)
        self.tokens = max(1, tokens // 2)
        self.halvings += 1

    def went(self, tokens: int, room: float | None) -> None:
        """A batch of so many padded tokens went, and `room` times what it took is free.

        Much smaller batches than may be say nothing, since some memory is taken once.
        """
        if room is None or 2 * tokens < self.tokens:
            return
        self.tokens = max(1, int(tokens * min(SHARE * room, GROWTH)))
        if self.ceiling is not None:
            self.tokens = max(1, min(self.tokens, self.ceiling // 2))


class Meter:
    """What a batch takes of the GPUs that a model is on."""

    def __init__(self, model: Model) -> None:
        devices = () if model.remote else model.devices
        self.devices = [x for x in devices if x.type == "cuda"]
        self.before: dict[torch.device, int] = {}

    def start(self) -> None:
        """Called before a batch."""
        for device in self.devices:
            torch.cuda.reset_peak_memory_stats(device)
            self.before[device] = torch.cuda.memory_allocated(device)

    def room(self) -> float | None:
        """How many times what was taken since `start` is free; None where there is no GPU."""
        times = []
        for device, before in self.before.items():
            taken = torch.cuda.max_memory_allocated(device) - before
            times.append(free_bytes(device) / max(taken, 1))
        return min(times) if times else None


class Batches:
    """Batches of prompts, like lengths together so that little is padding.

    What is done with a batch stands in `with batches.attempt():`. Where memory runs out
    there, the same prompts come again in smaller batches.

    Parameters
    ----------
    model, prompts
        What is measured.
    batch_size
        Prompts in a batch, as long as memory does; None to find a size.
    columns
        (prompt, K) columns at which per-position results are kept; None for all.
    shared
        Whether prompts that begin alike come together first.
    kind
        What is measured; a size that was found holds for the next time.

    Raises
    ------
    InputError
        If `batch_size` is not a whole number from 1 up, prompts are too long, or memory
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
        # Attention's part grows with the prompts' length.
        width = prompts.n_positions if columns is None else columns.shape[1]
        key = ("batch size", kind, shared, *(n.bit_length() for n in (prompts.n_positions, width)))
        self.found: Found = Found()
        if self.most is None:
            self.found = model.cache.setdefault(key, self.found)
        self.meter = Meter(model)
        self.n = 0
        self.error: str | None = None

    def __iter__(self) -> Iterator[Batch]:
        while len(self.left):
            lengths = np.maximum.accumulate(self.prompts.lengths[self.left])
            padded = lengths * np.arange(1, len(lengths) + 1)
            n = self.most or max(1, int((padded <= self.found.tokens).sum()))
            n = self.n = min(n, len(padded))
            self.error = None
            yield make_batch(self.model, self.prompts, self.left[:n], self.columns)
            if self.error is None:
                self.left = self.left[n:]
                self.found.went(int(padded[n - 1]), self.meter.room())
            else:
                self._halve(n, int(padded[n - 1]))

    @contextmanager
    def attempt(self) -> Iterator[None]:
        """Do something with a batch, which may run out of memory."""
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
        """Make room after memory ran out on n prompts, and go on with half of them.

        Comes when the error is gone, and with it what it held.
        """
        from accelerate.utils.memory import clear_device_cache

        clear_device_cache(garbage_collection=True)
        if n == 1:
            raise InputError(
                f"memory ran out on a single prompt of {tokens} tokens: take shorter prompts, "
                "keep='labels' where there is such an argument, a memory_budget=, or load the "
                f"model with quantization= or in bfloat16 ({self.error})"
            )
        self.found.ran_out(tokens)
        if self.most is not None:
            self.most = n // 2
        log.info("memory ran out on %d prompts (%d tokens); going on with half", n, tokens)


def out_of_memory(error: Exception) -> bool:
    """Whether an error says that memory ran out: a device's, the processor's or a server's."""
    from accelerate.utils.memory import should_reduce_batch_size
    from nnsight.intervention.backends.remote import RemoteError

    if isinstance(error, RemoteError):
        return "out of memory" in str(error).lower()
    return isinstance(error, torch.OutOfMemoryError) or should_reduce_batch_size(error)
