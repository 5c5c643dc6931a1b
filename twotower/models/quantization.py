"""Quantization settings for transformers, and detection of a model's quantization."""

from __future__ import annotations

import logging
from typing import Any

import torch

QUANTIZATIONS = ("int8", "nf4")


def quantization_config(quantization: str, dtype: torch.dtype | str) -> Any:
    """Return the transformers configuration of a quantization; nf4 computes in `dtype`."""
    from transformers import BitsAndBytesConfig

    if quantization == "int8":
        # It logs for every matrix product that inputs are cast to float16.
        logger = logging.getLogger("bitsandbytes.autograd._functions")
        if not any(isinstance(one, Once) for one in logger.filters):
            logger.addFilter(Once())
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16 if dtype == "auto" else dtype,
    )


def quantization_of(module: torch.nn.Module) -> str | None:
    """Return how a model's weights are quantized, from its modules; None if they are not.

    For methods other than bitsandbytes, return the method's name in the configuration.
    """
    found: dict[str, None] = {}
    for part in module.modules():
        names = {kind.__name__ for kind in type(part).__mro__}
        if "Linear8bitLt" in names:
            found["int8"] = None
        elif "Linear4bit" in names:
            weight: Any = getattr(part, "weight", None)
            found[str(getattr(weight, "quant_type", None) or "4 bit")] = None
    if found:
        return "+".join(found)
    config = getattr(getattr(module, "config", None), "quantization_config", None)
    about = config if isinstance(config, dict) else getattr(config, "__dict__", {})
    method = about.get("quant_method")
    return str(getattr(method, "value", method)) if method else None


class Once(logging.Filter):
    """Log filter that passes each message once."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        """Check whether a message is new."""
        new = record.getMessage() not in self.seen
        self.seen.add(record.getMessage())
        return new
