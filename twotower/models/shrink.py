"""A small random model of the same kind, with few, narrow layers.

The small model keeps the class, the kinds of layers, and the scaling, windows and rotary embedding
of attention. Only sizes change, so a check on it is valid for the kind.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch

from .random_weights import on_meta

HEADS, D_HEAD = 4, 16
"""Number of query heads, and dimension of each."""

SIZES = {
    "intermediate_size": 48,
    "n_inner": 48,
    "ffn_hidden_size": 48,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 24,
    "vocab_size": 128,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "q_lora_rank": 24,
    "kv_lora_rank": 24,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
}
"""Maximum of each size in the configuration, by name."""

SPREAD = 0.15
"""Standard deviation of the random weights; large enough for attention far from uniform."""


def shrunk(config: Any, lengths: Mapping[str, int] | None = None) -> Any:
    """Return a copy of a configuration for a small model of the same kind.

    Parameters
    ----------
    config
        A transformers configuration.
    lengths
        New values of the length settings, also in `rope_parameters`.
    """
    small = copy.deepcopy(config)
    n_heads = config.num_attention_heads
    n_kv = getattr(config, "num_key_value_heads", None) or n_heads
    heads = min(HEADS, n_heads)
    small.num_attention_heads = heads
    if getattr(config, "num_key_value_heads", None):
        small.num_key_value_heads = heads if n_kv == n_heads else max(1, heads * n_kv // n_heads)
    small.hidden_size = heads * D_HEAD
    latent = hasattr(config, "qk_rope_head_dim")  # then head_dim is that of the rotated part
    if getattr(config, "head_dim", None) and not latent:
        small.head_dim = D_HEAD
    if getattr(config, "rotary_dim", None):
        small.rotary_dim = min(config.rotary_dim, D_HEAD // 2)
    for name, most in SIZES.items():
        value = getattr(config, name, None)
        if isinstance(value, int) and not isinstance(value, bool):
            setattr(small, name, min(value, most))
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        setattr(small, name, 0)
    _fewer_layers(small)
    for name, value in (lengths or {}).items():
        _set(small, name, value)
    small.quantization_config = None
    del small.quantization_config
    return small


def _fewer_layers(config: Any) -> None:
    """Keep one layer of each kind, and at least two layers."""
    n = config.num_hidden_layers
    kinds = getattr(config, "layer_types", None)
    kept = sorted({kind: i for i, kind in reversed(list(enumerate(kinds or [])))}.values())
    for i in range(n):
        if len(kept) >= 2:
            break
        if i not in kept:
            kept = sorted([*kept, i])
    for name, value in list(vars(config).items()):
        if isinstance(value, list) and len(value) == n:
            setattr(config, name, [value[i] for i in kept])
    config.num_hidden_layers = len(kept)


def _set(config: Any, name: str, value: int) -> None:
    """Set a length everywhere in the configuration."""
    if hasattr(config, name):
        setattr(config, name, value)
    for owner in ("rope_parameters", "rope_scaling"):
        ropes = getattr(config, owner, None)
        ropes = ropes if isinstance(ropes, dict) else {}
        for rope in (ropes, *(one for one in ropes.values() if isinstance(one, dict))):
            if name in rope:
                rope[name] = value


def random_small_model(config: Any, seed: int = 0) -> Any:
    """Make a float32 model with random weights, biases and norms.

    The global random state does not change.

    Parameters
    ----------
    config
        A small configuration.
    seed
        Seed of the weights.
    """
    from transformers import AutoModelForCausalLM

    kind = type(on_meta(config))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if hasattr(kind, "_from_config"):
            model = kind._from_config(config, dtype=torch.float32)
        else:
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                noise = torch.randn_like(parameter)
                if parameter.dim() > 1:
                    parameter.copy_(SPREAD * noise)
                else:
                    parameter.copy_((not name.endswith("bias")) + SPREAD * noise)
    return model.eval()
