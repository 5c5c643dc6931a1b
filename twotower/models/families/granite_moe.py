"""Granite with a shared MLP beside the experts, and with windows and sinks."""

from __future__ import annotations

from typing import Any

import torch

from ..architecture import call, first
from .granite import Granite, GraniteMoE
from .hybrids import state_of_mamba2, unlimited


class GraniteSWA(Granite):
    """Granite, dense, with local layers; every head has a sink."""

    model_types = ("granite_swa",)
    more_names = frozenset({"sinks"})

    def rotates(self, layer: int) -> bool:
        return bool(self.config.layer_rope_theta[layer])

    def sinks(self, attention: Any) -> torch.Tensor:
        return attention.sinks


class GraniteMoESWA(GraniteSWA, GraniteMoE):
    """Granite with experts and local layers."""

    model_types = ("granitemoe_swa",)


class GraniteExperts(GraniteMoE):
    """Granite of the kind with a shared MLP, but without one."""

    model_types = ("granitemoeshared",)


class GraniteShared(GraniteMoE):
    """Granite with a shared MLP, whose output is added to that of the experts."""

    model_types = ("granitemoeshared",)
    mlp_name = "shared_mlp"
    more_names = frozenset({"block_sparse_moe"})

    def feed_forward(self, block: Any, x: torch.Tensor) -> torch.Tensor:
        shared = call(block.shared_mlp, x)
        return call(block.block_sparse_moe, x) + shared if self.config.num_local_experts else shared

    def mlp_output(self, block: Any) -> torch.Tensor:
        if not self.config.num_local_experts:
            return block.shared_mlp.output
        experts = first(block.block_sparse_moe.output)
        return experts + block.shared_mlp.output


class GraniteHybrid(GraniteShared):
    """Granite 4; Mamba layers, and there may be no experts and no rotary embedding."""

    model_types = ("granitemoehybrid",)
    mixer_name = "mamba"

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.rotary = config.position_embedding_type == "rope"
        self.mixer_cache = unlimited(config.time_step_limit)

    def mixer_state(self) -> int:
        return state_of_mamba2(self.config)


class GraniteSharedSWA(GraniteSWA, GraniteShared):
    """Granite with a shared MLP and local layers."""

    model_types = ("granitemoe_swa",)
    more_names = frozenset({"block_sparse_moe", "sinks"})
