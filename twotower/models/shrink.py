"""A small random model of the same kind, with few, narrow layers.

The small model keeps the class, the kinds of layers, and the scaling, windows and rotary embedding
of attention. Only sizes change, so a check on it is valid for the kind.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from .random_weights import on_meta

HEADS, D_HEAD = 4, 16
"""Number of query heads, and dimension of each."""

LAYERS = 2
"""Smallest number of layers."""

SIZES = {
    "intermediate_size": 48,
    "n_inner": 48,
    "ffn_hidden_size": 48,
    "ffn_dim": 48,
    "dff": 48,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 24,
    "moe_shared_expert_intermediate_size": 24,
    "intermediate_size_mlp": 48,
    "shared_intermediate_size": 24,
    "prefix_dense_intermediate_size": 48,
    "expert_ffn_hidden_size": 24,
    "hidden_size_per_layer_input": 8,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "top_k_experts": 2,
    "moe_topk": 2,
    "moe_k": 2,
    "n_group": 1,
    "topk_group": 1,
    "q_lora_rank": 24,
    "kv_lora_rank": 24,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "lru_width": HEADS * D_HEAD,
    "mamba_d_state": 8,
    "mamba_d_ssm": 2 * HEADS * D_HEAD,
    "mamba_dt_rank": 8,
    "mamba_chunk_size": 16,
    "mamba_n_groups": 1,
    "mamba_head_dim": 16,
    "mamba_d_head": 16,
    "mamba_num_heads": 8,
    "mamba_n_heads": 8,
    "ssm_state_size": 8,
    "n_groups": 1,
    "chunk_size": 16,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "rotary_dim": 8,
}
"""Maximum of each size in the configuration, by name."""

HEAD_SIZES = ("head_dim", "global_head_dim", "swa_head_dim", "kv_channels")
"""Names of the sizes of heads."""

DERIVED = ("kv_sharing_modes", "layers_block_type")
"""Properties with an item per layer, computed from settings."""

INDICES = ("_indices", "_idxs", "moe_layers", "only_layers")
"""Endings of settings that list numbers of layers."""

KINDS = 6
"""Largest number of kinds of layers in a setting with an item per layer."""

WIDTHS = ("word_embed_proj_dim", "attention_hidden_size")
"""Sizes besides `hidden_size` that equal the width of the residual stream."""

SPREAD = 0.15
"""Standard deviation of the random weights; large enough for attention far from uniform."""


def shrunk(config: Any, lengths: Mapping[str, int] | None = None, vocabulary: int = 128) -> Any:
    """Return a configuration for a small model of the same kind.

    Parameters
    ----------
    config
        A transformers configuration of a language model.
    lengths
        New values of the length settings, also in `rope_parameters`.
    vocabulary
        Largest size of the vocabulary.
    """
    settings = {name: x for name, x in config.to_dict().items() if not name.startswith("_")}

    def called(name: str) -> str:
        """Return the configuration's own name of a setting."""
        return str(config.attribute_map.get(name, name))

    settings.pop("quantization_config", None)
    settings.pop("torch_dtype", None)
    n_heads = config.num_attention_heads
    n_kv = settings.get("num_key_value_heads") or settings.get("num_kv_heads") or n_heads
    heads = min(HEADS, n_heads)
    settings[called("num_attention_heads")] = heads
    kept_kv = heads if n_kv == n_heads else max(1, heads * n_kv // n_heads)
    for name in ("num_key_value_heads", "num_global_key_value_heads", "num_kv_heads"):
        if name in settings and (settings[name] or name == "num_key_value_heads"):
            settings[name] = kept_kv
    width = heads * D_HEAD
    was = config.hidden_size
    settings[called("hidden_size")] = width
    for name in ("vocab_size", "vocab_size_per_layer_input"):
        if name in settings:
            settings[name] = min(settings[name], vocabulary)
    for name in WIDTHS:
        if settings.get(name) == was:
            settings[name] = width
    for name in HEAD_SIZES:
        if name in settings:
            settings[name] = D_HEAD
    if "qk_rope_head_dim" in settings:  # latent attention: the part of a key that is rotated
        settings["head_dim"] = SIZES["qk_rope_head_dim"]
    if settings.pop("per_layer_config", None):  # Gemma 4 makes it anew
        settings["global_head_dim"] = D_HEAD
    for name, most in SIZES.items():
        value = settings.get(name)
        if isinstance(value, int) and not isinstance(value, bool):
            settings[name] = min(value, most)
    if "mamba_d_head" in settings:  # the heads fill the mixer's width
        inner = settings.get("mamba_d_ssm") or settings["mamba_expand"] * width
        settings["mamba_d_head"] = inner // settings["mamba_n_heads"]
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        settings[name] = 0
    _fewer_layers(config, settings, called("num_hidden_layers"))
    for name, value in (lengths or {}).items():
        _set(settings, name, value)
    return type(config).from_dict(settings)


def _fewer_layers(config: Any, settings: dict[str, Any], name: str) -> None:
    """Keep one layer of each kind, and at least two layers."""
    n = config.num_hidden_layers
    lists = [x for x in settings.values() if _is_by_layer(x, n)]
    derived = [getattr(config, known, None) for known in DERIVED if known not in settings]
    derived = [x for x in derived if _is_by_layer(x, n)]
    kinds = [repr([x[layer] for x in (*lists, *derived)]) for layer in range(n)]
    kept = sorted({kind: i for i, kind in reversed(list(enumerate(kinds)))}.values())
    if derived:  # from periods and the like: keep all layers up to the last one needed
        kept = list(range(kept[-1] + 1))
    for i in range(n):
        if len(kept) >= LAYERS:
            break
        if i not in kept:
            kept = sorted([*kept, i])
    for key, value in settings.items():
        if _is_by_layer(value, n):
            settings[key] = [value[i] for i in kept]
        elif key.endswith(INDICES) and isinstance(value, list | tuple):
            settings[key] = [kept.index(i) for i in value if i in kept]
    if settings.get("num_kv_shared_layers"):
        first = n - settings["num_kv_shared_layers"]
        settings["num_kv_shared_layers"] = sum(i >= first for i in kept)
    settings[name] = len(kept)


def _is_by_layer(value: Any, n: int) -> bool:
    """Check that a value has one item per layer, of a few kinds."""
    if not isinstance(value, list | tuple) or len(value) != n:
        return False
    return len(set(map(repr, value))) <= KINDS


def _set(settings: dict[str, Any], name: str, value: int) -> None:
    """Set a length everywhere in the settings."""
    if name in settings:
        settings[name] = value
    for owner in ("rope_parameters", "rope_scaling"):
        ropes = settings.get(owner)
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
    kind = type(on_meta(config))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = kind._from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                noise = torch.randn_like(parameter)
                if parameter.dim() > 1:
                    parameter.copy_(SPREAD * noise)
                else:
                    parameter.copy_((not name.endswith("bias")) + SPREAD * noise)
    return model.eval()
