"""Unwrap the transformers model inside peft, torch.compile and data-parallel wrappers."""

from __future__ import annotations

import sys
from typing import Any

import torch

from ..errors import ModelError


def unwrapped(model: Any) -> Any:
    """Return the model inside peft, torch.compile and data-parallel wrappers.

    It shares weights and adapters with the wrapper, so changes to one affect the other. Measures
    run it uncompiled.

    Raises
    ------
    ModelError
        If the wrapper does more than the model inside: prompt learning adds its own tokens, keys
        or values before the prompt, activated LoRA looks for tokens, and FSDP shards weights.
    """
    while True:
        inner = _inside(model)
        if inner is None:
            return model
        model = inner


def _inside(model: Any) -> Any:
    kind = type(model).__name__
    if kind == "FullyShardedDataParallel":
        raise ModelError("FSDP shards the weights of a model; load it with device_map= instead")
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
                f"the adapter {name!r} uses prompt learning ({config.peft_type.value}): it adds "
                "vectors before the prompt that match no tokens; load the model without it"
            )
        if getattr(config, "alora_invocation_tokens", None):
            raise ModelError(
                f"the adapter {name!r} is an activated LoRA: it acts only after certain tokens, "
                "which the wrapper looks for and the model inside does not; merge it, or load the "
                "model without it"
            )
    return model.get_base_model()
