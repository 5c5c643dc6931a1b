"""From what a user holds to the transformers model inside: adapted, compiled, data parallel."""

from __future__ import annotations

import sys
from typing import Any

import torch

from ..errors import ModelError


def unwrapped(model: Any) -> Any:
    """The model inside peft's, torch.compile's and data-parallel wrappers.

    It shares its weights with the wrapper, and adapters are part of it: what is done to one shows
    in the other. Measures run it as it is written, not compiled.

    Raises
    ------
    ModelError
        If the wrapper does more than the model inside: prompt learning puts tokens or keys and
        values of its own before the prompt, FSDP keeps weights in pieces.
    """
    while True:
        inner = _inside(model)
        if inner is None:
            return model
        model = inner


def _inside(model: Any) -> Any:
    kind = type(model).__name__
    if kind == "FullyShardedDataParallel":
        raise ModelError("a model under FSDP keeps its weights in pieces; load it with device_map=")
    if kind == "OptimizedModule":
        return model._orig_mod
    parallel = (torch.nn.DataParallel, torch.nn.parallel.DistributedDataParallel)
    if isinstance(model, parallel):
        return model.module
    peft = sys.modules.get("peft")
    if peft is None or not isinstance(model, (peft.PeftModel, peft.PeftMixedModel)):
        return None
    for name, config in getattr(model, "peft_config", {}).items():
        if getattr(config, "is_prompt_learning", False):
            raise ModelError(
                f"the adapter {name!r} is one of prompt learning ({config.peft_type.value}): it "
                "puts vectors of its own before the prompt, which has no tokens for them"
            )
    return model.get_base_model()
