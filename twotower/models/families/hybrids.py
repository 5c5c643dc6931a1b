"""Llama-like heads in some layers, and state-space models or convolutions in the others."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from ..architecture import first
from ..mixer_state import MixerState
from .llama import Llama
from .olmo import OLMo2
from .qwen3_5 import state_of_delta


def unlimited(time_steps: Sequence[float]) -> str | None:
    """Return the cache's argument of Mamba 2 if its time steps have no limits, else None.

    In transformers, single tokens ignore the limits that whole sequences respect.
    """
    return "cache_params" if tuple(time_steps) == (0, math.inf) else None


def state_of_mamba2(config: Any) -> int:
    """Return the number of elements of a state of Mamba 2 for one sequence."""
    inner = config.mamba_n_heads * config.mamba_d_head
    convolved = inner + 2 * config.mamba_n_groups * config.mamba_d_state
    return int(inner * config.mamba_d_state + convolved * config.mamba_d_conv)


class Jamba(Llama):
    """Jamba; heads without rotary embedding."""

    model_types = ("jamba",)
    final_norm_path = "model.final_layernorm"
    mlp_norm_name = "pre_ff_layernorm"
    mlp_name = "feed_forward"
    mixer_name = "mamba"
    mixer_cache = "cache_params"
    rotary = False

    def has_heads(self, layer: int) -> bool:
        return self.config.layers_block_type[layer] in ("attention", "full_attention")

    def mixer_state(self) -> int:
        c = self.config
        return int(c.mamba_expand * self.d_model * (c.mamba_d_state + c.mamba_d_conv))


class Bamba(Jamba):
    """Bamba; rotary embedding on part of each head."""

    model_types = ("bamba",)
    rotary = True

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.mixer_cache = unlimited(config.time_step_limit)

    def mixer_state(self) -> int:
        return state_of_mamba2(self.config)


class FalconH1(Llama):
    """Falcon-H1; in every layer heads and a state-space model read the same norm."""

    model_types = ("falcon_h1",)
    final_norm_path = "model.final_layernorm"
    mlp_norm_name = "pre_ff_layernorm"
    mlp_name = "feed_forward"
    mixer_name = "mamba"

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.logit_multiplier = config.lm_head_multiplier
        self.mixer_cache = unlimited(config.time_step_limit)

    def write_multiplier(self, layer: int) -> float:
        return float(self.config.attention_out_multiplier)

    def has_heads(self, layer: int) -> bool:
        return True

    def mixes(self, layer: int) -> bool:
        return True

    def mixer_state(self) -> int:
        return state_of_mamba2(self.config)

    def attention_input(self, block: Any, x: torch.Tensor) -> torch.Tensor:
        return self.attention_norm(block)(x) * self.config.attention_in_multiplier

    def write(self, block: Any, output: torch.Tensor) -> torch.Tensor:
        return output * self.config.attention_out_multiplier

    def written(self, block: Any, output: torch.Tensor) -> torch.Tensor:
        return output * self.config.attention_out_multiplier

    def mixer_input(self, block: Any, x: torch.Tensor) -> torch.Tensor:
        return self.attention_norm(block)(x)

    def mixer_write(self, block: Any, output: torch.Tensor) -> torch.Tensor:
        return output * self.config.ssm_out_multiplier

    def mixer_written(self, block: Any, output: torch.Tensor) -> torch.Tensor:
        return output * self.config.ssm_out_multiplier

    def split(
        self, block: Any, projected: list[torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        q, k, v = Llama.split(self, block, projected)
        return q, k * self.config.key_multiplier, v


class Lfm2(Llama):
    """LFM2; short convolutions in layers without heads."""

    model_types = ("lfm2", "lfm2_moe")
    final_norm_path = "model.embedding_norm"
    attention_norm_name = "operator_norm"
    mlp_norm_name = "ffn_norm"
    mlp_name = "feed_forward"
    projection_name = "out_proj"
    more_names = frozenset({"q_layernorm", "k_layernorm"})
    mixer_name = "conv"
    mixer_cache = "past_key_values"

    def split(
        self, block: Any, projected: list[torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        q, k, v = Llama.split(self, block, projected)
        attention = self.attention(block)
        return attention.q_layernorm(q), attention.k_layernorm(k), v

    def mixer_state(self) -> int:
        return int(self.d_model * self.config.conv_L_cache)


class NemotronH(Llama):
    """Nemotron-H; each block is heads, a state-space model, an MLP or experts."""

    model_types = ("nemotron_h",)
    final_norm_path = "model.norm_f"
    attention_norm_name = "norm"
    mlp_norm_name = "norm"
    attention_name = "mixer"
    mlp_name = "mixer"
    mixer_name = "mixer"
    rotary = False

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.mixer_cache = unlimited((config.time_step_min, math.inf))

    def has_heads(self, layer: int) -> bool:
        return self.config.layers_block_type[layer] in ("attention", "full_attention")

    def mixes(self, layer: int) -> bool:
        return self.config.layers_block_type[layer] in ("mamba", "linear_attention")

    def has_mlp(self, layer: int) -> bool:
        return not self.has_heads(layer) and not self.mixes(layer)


class OlmoHybrid(OLMo2):
    """OLMo Hybrid; norms follow the sublayers in layers with heads, and precede them in others."""

    model_types = ("olmo_hybrid",)
    mixer_name = "linear_attn"
    mixer_cache = "cache_params"
    more_names = frozenset({"q_norm", "k_norm", "input_layernorm"})

    def attention_post_norm(self, block: Any) -> Any | None:
        return None if _linear(block) else block.post_attention_layernorm

    def mlp_post_norm(self, block: Any) -> Any | None:
        return None if _linear(block) else block.post_feedforward_layernorm

    def mlp_norm(self, block: Any) -> Any | None:
        return block.post_attention_layernorm if _linear(block) else None

    def mixer_input(self, block: Any, x: torch.Tensor) -> torch.Tensor:
        return block.input_layernorm(x)

    def mixer_state(self) -> int:
        return state_of_delta(self.config)


def _linear(block: Any) -> bool:
    return hasattr(block, "linear_attn")


class RecurrentGemma(Llama):
    """RecurrentGemma; layers of heads with a window, and of linear recurrences.

    Its mixers keep their state in the module, so they run on whole sequences.
    """

    model_types = ("recurrent_gemma",)
    final_norm_path = "model.final_norm"
    attention_norm_name = "temporal_pre_norm"
    mlp_norm_name = "channel_pre_norm"
    attention_name = "temporal_block"
    mlp_name = "mlp_block"
    mixer_name = "temporal_block"

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.logit_softcap = config.logits_soft_cap

    def has_heads(self, layer: int) -> bool:
        return self.config.layers_block_type[layer] == "sliding_attention"

    def rotary_tables(self, attention: Any) -> tuple[torch.Tensor, torch.Tensor]:
        (x, *_), named = attention.inputs
        cos, sin = attention.rotary_emb(x, named["position_ids"])
        return cos, sin

    def mix(
        self, block: Any, x: torch.Tensor, mask: torch.Tensor, state: MixerState | None = None
    ) -> torch.Tensor:
        positions = (mask.long().cumsum(dim=-1) - 1).clamp(min=0)
        mixed = self.mixer(block)(x, position_ids=positions, attention_mask=mask, use_cache=False)
        return first(mixed)

    def window(self, layer: int) -> int | None:
        return int(self.config.attention_window_size)
