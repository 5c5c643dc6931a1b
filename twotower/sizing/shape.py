"""A model without weights: the sizes of its modules, and their placement by transformers."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import cached_property
from types import SimpleNamespace
from typing import Any

import torch

from ..errors import InputError, ModelError
from ..models import Architecture, Model
from ..models.load import load_config, torch_dtype
from ..models.quantization import quantization_config
from ..models.random_weights import on_meta
from ..models.registry import find_architecture

SCALES = {"nf4": 1 / 64 + 4 / (64 * 256), "int8": 0.0}
"""Extra bytes per quantized weight: nf4 has one byte for 64 weights and four for 256 of those
bytes (double quantization); int8 has four per row, counted as 0."""

DEVICE_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")


class Shape:
    """A model without weights, with the sizes of its modules.

    Parameters
    ----------
    name, dtype, quantization, revision
        As for `twotower.load`.
    """

    def __init__(
        self, name: str, dtype: str | None, quantization: str | None, revision: str | None
    ) -> None:
        from transformers.quantizers import AutoHfQuantizer

        self.asked = (name, dtype, revision)
        given = torch_dtype(dtype)
        config = load_config(name, revision)
        if isinstance(given, str):
            given = getattr(config, "dtype", None) or torch.float32
        self.dtype, self.quantization = given, quantization
        self.module = on_meta(config, given)
        self.architecture: Architecture = find_architecture(config, self.module)
        self.quantizer = None
        if quantization is not None:
            settings = quantization_config(quantization, given)
            self.quantizer = AutoHfQuantizer.from_config(settings, pre_quantized=False)
            self.quantizer.preprocess_model(model=self.module, device_map=None)
        traced = SimpleNamespace(_module=self.module)  # never run
        self.model = Model(traced, None, self.architecture, name, revision)
        if self.model.n_layers < 1:
            raise ModelError(f"{name} has {self.model.n_layers} layers, by its config.json")

    def quantized(self, quantization: str) -> Shape:
        """Return the same model, quantized."""
        name, dtype, revision = self.asked
        return Shape(name, dtype, quantization, revision)

    def place(self, limits: Mapping[int | str, int], device_map: str) -> dict[str, int | str]:
        """Return the device of each module, as `from_pretrained` would place it."""
        if device_map not in DEVICE_MAPS:
            raise InputError(
                f"plans do not support device_map={device_map!r}; use {', '.join(DEVICE_MAPS)}"
            )
        if len(limits) == 1:
            return {"": "cpu"}
        whole = self.module._no_split_modules
        # Silence warnings about missing GPUs and offloading: the plan is about other machines.
        names = ("accelerate.utils.modeling", "transformers.integrations.accelerate")
        levels = {logging.getLogger(name): logging.getLogger(name).level for name in names}
        for logger in levels:
            logger.setLevel(logging.ERROR)
        try:
            return self._place(dict(limits), device_map, whole)
        finally:
            for logger, level in levels.items():
                logger.setLevel(level)

    def _place(
        self, room: dict[int | str, Any], device_map: str, whole: Any
    ) -> dict[str, int | str]:
        from transformers.integrations.accelerate import (
            get_balanced_memory,
            infer_auto_device_map,
        )

        if device_map != "sequential":
            room = get_balanced_memory(
                self.module,
                max_memory=room,
                no_split_module_classes=whole,
                hf_quantizer=self.quantizer,
                low_zero=device_map == "balanced_low_0",
            )
        if self.quantizer is not None:
            room = self.quantizer.adjust_max_memory(room)
        return dict(
            infer_auto_device_map(
                self.module,
                max_memory=room,
                no_split_module_classes=whole,
                hf_quantizer=self.quantizer,
            )
        )

    @cached_property
    def bytes_by_module(self) -> dict[str, int]:
        """Bytes of each module's own weights and buffers."""
        from transformers.integrations.accelerate import compute_module_sizes

        _, found = compute_module_sizes(self.module, self.quantizer)
        if self.quantizer is not None and self.quantization is not None:
            for name, weight in self.module.named_parameters():
                if self.quantizer.param_needs_quantization(self.module, name):
                    found[name.rpartition(".")[0]] += weight.numel() * SCALES[self.quantization]
        return {name: int(size) for name, size in found.items()}
