"""nnsight wrapper of a loaded model, with support for accelerate's offloading."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import nnsight
import torch
from nnsight.intervention.interleaver import Interleaver
from nnsight.modeling.tp import TPFragments

from .model import device_of


class OneThread(Interleaver):
    """An interleaver that lets forwards of other threads pass while a trace runs.

    nnsight's own would hand their values to the trace.
    """

    _tracing: int | None = None

    @property
    def interleaving(self) -> bool:
        """Whether this thread runs a trace."""
        return self._tracing == threading.get_ident()

    @interleaving.setter
    def interleaving(self, on: bool) -> None:
        self._tracing = threading.get_ident() if on else None


class Traced(nnsight.TransformersModel):
    """An nnsight model that sends its inputs to the device of the embedding.

    nnsight sends them to the device of the first weight, which is "meta" if that weight is
    offloaded to disk or CPU memory.
    """

    @property
    def device(self) -> torch.device:
        """Device of the inputs."""
        return device_of(self._module.get_input_embeddings())


def traced(module: Any, tokenizer: Any) -> Traced:
    """Wrap a loaded transformers model in nnsight."""
    with _silent_pipeline():
        return _traced(module, tokenizer)


@contextmanager
def _silent_pipeline() -> Iterator[None]:
    """Silence the pipeline that nnsight makes: it does not know language models in wrappers."""
    logger = logging.getLogger("transformers.pipelines.base")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


def _traced(module: Any, tokenizer: Any) -> Traced:
    placed = getattr(module, "hf_device_map", None)
    settings = {
        "task": "text-generation",
        "tokenizer": tokenizer,
        "interleaver": OneThread(fragments=TPFragments()),
    }
    if not placed:
        return Traced(module, **settings)
    # transformers uses the first device for its pipeline, and "disk" is not a device.
    runs_on = device_of(module.get_input_embeddings())
    module.hf_device_map = {name: runs_on if at == "disk" else at for name, at in placed.items()}
    try:
        return Traced(module, **settings)
    finally:
        module.hf_device_map = placed
