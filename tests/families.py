"""Small random models of every type of transformers' causal language models that is supported.

`FAMILIES` holds what a type needs beyond `SIZES`: every kind of layer, windows and other lengths
below those of the prompts (about 41 tokens), softcaps and clips that act, multipliers away from 1.
A name is a type of `config.model_type`, or "type+variant", which adds to the type's settings.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers
from tiny import draw_weights
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CLASSES

SIZES: dict[str, Any] = {
    "vocab_size": 704,
    "max_position_embeddings": 256,
    "n_positions": 256,
    "max_seq_len": 256,
    **{name: 48 for name in ("hidden_size", "n_embd", "d_model", "word_embed_proj_dim")},
    **{name: 64 for name in ("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size")},
    **{name: 3 for name in ("num_hidden_layers", "n_layer", "n_layers")},
    **{name: 4 for name in ("num_attention_heads", "n_head", "n_heads")},
    "num_key_value_heads": 2,
    "head_dim": 12,
    "rotary_dim": 8,
    "sliding_window": 12,
    "attention_chunk_size": 12,
    **{name: 4 for name in ("num_experts", "num_local_experts", "n_routed_experts")},
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 24,
    **{name: 1 for name in ("num_shared_experts", "n_shared_experts", "n_group", "topk_group")},
    "first_k_dense_replace": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 12,
}
"""Settings of every type, as far as its configuration has them."""

OPTIONAL = ("num_key_value_heads", "sliding_window", "attention_chunk_size", "q_lora_rank")
"""Settings that stay None where that is the default."""

# ---- what several types share --------------------------------------------------------------------

SLIDING = ["sliding_attention", "full_attention", "sliding_attention"]
FULL = ["full_attention"] * 3
SPARSE = ["dense", "sparse", "sparse"]
LINEAR = ["linear_attention", "full_attention", "linear_attention", "full_attention"]

ROTARY = {"rope_type": "default", "rope_theta": 10000.0}
PARTIAL = {**ROTARY, "partial_rotary_factor": 0.5}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 12,
}

BIAS = {"attention_bias": True}
BIASES = {"attention_bias": True, "mlp_bias": True}
MULTIPLIERS = {"attention_multiplier": 0.2, "residual_multiplier": 0.7, "logits_scaling": 2.0}
GRANITE = {**MULTIPLIERS, "embedding_multiplier": 3.0}
DELTA = {
    "num_hidden_layers": 4,
    "layer_types": LINEAR,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
QWEN35 = {**DELTA, "mlp_only_layers": []}
MAMBA = {
    "num_hidden_layers": 4,
    "mamba_d_state": 8,
    "mamba_d_conv": 4,
    "mamba_expand": 2,
    "mamba_dt_rank": 8,
    "mamba_n_heads": 8,
    "mamba_d_head": 12,
    "mamba_n_groups": 1,
    "mamba_chunk_size": 16,
}
CONVOLUTION = {
    "num_hidden_layers": 4,
    "layer_types": ["conv", "full_attention", "conv", "full_attention"],
}
LLAMA4 = {
    "num_hidden_layers": 4,
    "no_rope_layers": [1, 0, 1, 0],
    "moe_layers": [1, 2],
    "intermediate_size_mlp": 40,
    "floor_scale": 5,
    "attn_scale": 0.8,
    "attention_bias": True,
}
KIMI = {
    "num_hidden_layers": 4,
    "layer_types": LINEAR,
    "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"],
    "linear_num_heads": 4,
    "linear_head_dim": 12,
    "num_key_value_heads": 4,
    "head_dim": ...,
}
GEMMA4 = {
    "num_hidden_layers": 5,
    "layer_types": ["sliding_attention", *SLIDING, "full_attention"],
    "head_dim": 8,
    "global_head_dim": 12,
    "num_global_key_value_heads": 1,
    "final_logit_softcapping": 5.0,
    "hidden_size_per_layer_input": 0,
    "vocab_size_per_layer_input": 704,
    "num_kv_shared_layers": 0,
    "top_k_experts": 2,
}
LATENT = {"attention_bias": True, "num_key_value_heads": 4, "head_dim": ...}
LATENT_YARN = {**YARN, "mscale": 1.0, "mscale_all_dim": 0.8, "beta_fast": 32, "beta_slow": 1}
LATENT_LONG = {
    "max_position_embeddings": 16384,
    "rope_parameters": {**LATENT_YARN, "original_max_position_embeddings": 4096},
}
GROUPS_OF_EXPERTS = {
    "n_routed_experts": 8,
    "n_group": 4,
    "topk_group": 2,
    "num_experts_per_tok": 3,
    "num_local_experts": ...,
    "num_experts": ...,
}
ERNIE_EXPERTS = {
    "moe_num_experts": 4,
    "moe_k": 2,
    "moe_num_shared_experts": 1,
    "moe_layer_start_index": 1,
}
FALCON_NEW = {"new_decoder_architecture": True, "num_kv_heads": 2}
FALCON_RW = {"alibi": True, "parallel_attn": False, "multi_query": False}

VISION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}

# ---- types and variants --------------------------------------------------------------------------

FAMILIES: dict[str, dict[str, Any]] = {
    "afmoe": {**BIAS, "layer_types": SLIDING, "mup_enabled": True, "route_scale": 0.7},
    "apertus": BIAS,
    "arcee": BIASES,
    "aria_text": {**BIAS, "moe_num_experts": 4, "moe_topk": 2, "moe_num_shared_experts": 1},
    "axk1": LATENT,
    "axk1+yarn": {"rope_parameters": LATENT_YARN},
    "axk1+long": {**LATENT_LONG, **GROUPS_OF_EXPERTS},
    "axk1+halves": {"rope_interleave": False},
    "bailing_hybrid": KIMI,
    "bamba": {**MAMBA, "attn_layer_indices": [1, 3]},
    "beam": {
        **BIAS,
        "layer_types": SLIDING,
        "mlp_layer_types": SPARSE,
        "final_logit_softcapping": 5.0,
    },
    "beam+rope": {"rope_parameters": {"sliding_attention": None, "full_attention": ROTARY}},
    "beam+nocap": {"final_logit_softcapping": None},
    "biogpt": {},
    "bloom": {},
    "bloom+six": {"hidden_size": 72, "n_head": 6},
    "codegen": {"n_ctx": 256},
    "codegen+eight": {"n_head": 8, "n_embd": 96, "rotary_dim": 4},
    "cohere": {"use_qk_norm": True, "logit_scale": 0.3},
    "cohere+plain": {"use_qk_norm": False},
    "cohere2": {"layer_types": SLIDING, "logit_scale": 0.3},
    "cohere2_moe": {
        **BIAS,
        "layer_types": ["full_attention", "full_attention", "sliding_attention"],
        "mlp_layer_types": SPARSE,
        "prefix_dense_intermediate_size": 40,
        "logit_scale": 0.3,
    },
    "cohere2_moe+rms": {
        "rms_norm_eps": 1e-5,
        "shared_expert_combination_strategy": "sum",
        "prefix_dense_sliding_window_pattern": 2,
        "expert_selection_fn": "sigmoid",
    },
    "cohere_compass_text": {
        **BIAS,
        "layer_types": SLIDING,
        "logit_scale": 0.3,
        "rope_parameters": {"sliding_attention": ROTARY, "full_attention": None},
    },
    "cohere_compass_text+both": {
        "logit_scale": None,
        "rope_parameters": {
            "sliding_attention": ROTARY,
            "full_attention": {**ROTARY, "rope_theta": 500.0},
        },
    },
    "ctrl": {"dff": 64},
    "cwm": {"layer_types": SLIDING},
    "dbrx": {
        "attn_config": {"clip_qkv": 1.0, "kv_n_heads": 2, "rope_theta": 10000.0},
        "ffn_config": {"ffn_hidden_size": 24, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v2": LATENT,
    "deepseek_v2+direct": {"q_lora_rank": None},
    "deepseek_v2+yarn": {"rope_parameters": LATENT_YARN},
    "deepseek_v2+long": {
        **LATENT_LONG,
        **GROUPS_OF_EXPERTS,
        "topk_method": "group_limited_greedy",
    },
    "deepseek_v3": LATENT,
    "deepseek_v3+direct": {"q_lora_rank": None},
    "deepseek_v3+yarn": {"rope_parameters": LATENT_YARN},
    "deepseek_v3+long": {**LATENT_LONG, **GROUPS_OF_EXPERTS},
    "deepseek_v3+halves": {"rope_interleave": False},
    "dots1": {**BIAS, "layer_types": SLIDING, "routed_scaling_factor": 0.7},
    "emu3": {"head_dim": ...},
    "emu3+bias": BIAS,
    "ernie4_5": {"use_bias": True},
    "ernie4_5_moe": {"use_bias": True, **ERNIE_EXPERTS},
    "exaone4": {"layer_types": SLIDING},
    "exaone4+full": {"sliding_window": None, "layer_types": FULL},
    "exaone_moe": {"layer_types": SLIDING, "mlp_layer_types": SPARSE},
    "falcon": {"bias": True, "num_kv_heads": None, "head_dim": ...},
    "falcon+multi": {"multi_query": True, "bias": False},
    "falcon+many": {"multi_query": False},
    "falcon+sequential": {"parallel_attn": False, "multi_query": False},
    "falcon+sequentialmulti": {"parallel_attn": False},
    "falcon+alibi": {"alibi": True},
    "falcon+rw": FALCON_RW,
    "falcon+rwsix": {**FALCON_RW, "hidden_size": 72, "num_attention_heads": 6},
    "falcon+new": FALCON_NEW,
    "falcon+newonenorm": {**FALCON_NEW, "num_ln_in_parallel_attn": 1},
    "falcon+newalibi": {**FALCON_NEW, "alibi": True, "bias": False},
    "falcon+yarn": {"rope_parameters": YARN},
    "falcon_h1": {
        **MAMBA,
        "mamba_d_ssm": 96,
        "attention_in_multiplier": 0.7,
        "attention_out_multiplier": 0.8,
        "ssm_out_multiplier": 0.6,
        "key_multiplier": 0.9,
        "lm_head_multiplier": 0.5,
    },
    "flex_olmo": {},
    "flint": {**BIAS, "layer_types": SLIDING, "mlp_only_layers": [0]},
    "fuyu": {"hidden_size": 64},
    "gemma": BIAS,
    "gemma2": {
        "layer_types": SLIDING,
        "query_pre_attn_scalar": 12,
        "attn_logit_softcapping": 3.0,
        "final_logit_softcapping": 5.0,
    },
    "gemma3_text": {"layer_types": SLIDING, "query_pre_attn_scalar": 10},
    "gemma3": {"layer_types": SLIDING, "query_pre_attn_scalar": 10},
    "gemma4_text": GEMMA4,
    "gemma4_text+keysarevalues": {"attention_k_eq_v": True},
    "gemma4_text+embeddings": {"hidden_size_per_layer_input": 8},
    "gemma4_text+experts": {"enable_moe_block": True, "num_experts": 4},
    "gemma4_text+shared": {"hidden_size_per_layer_input": 8, "num_kv_shared_layers": 2},
    "gemma4_text+all": {
        "attention_k_eq_v": True,
        "hidden_size_per_layer_input": 8,
        "num_kv_shared_layers": 2,
    },
    "gemma4": GEMMA4,
    "gemma4_unified_text": GEMMA4,
    "gemma4_unified": GEMMA4,
    "glm": {"head_dim": 16, "hidden_size": 64},
    "glm4": {"head_dim": 16},
    "glm4_moe": {**BIAS, "use_qk_norm": True, "head_dim": 16},
    "glm4_moe+plain": {"use_qk_norm": False},
    "glm4_moe_lite": LATENT,
    "glm4_moe_lite+direct": {"q_lora_rank": None},
    "glm4_moe_lite+yarn": {"rope_parameters": LATENT_YARN},
    "glm4_moe_lite+long": {**LATENT_LONG, **GROUPS_OF_EXPERTS},
    "glm4_moe_lite+halves": {"rope_interleave": False},
    "got_ocr2": {},
    "gpt-sw3": {},
    "gpt2": {},
    "gpt2+bylayer": {"scale_attn_by_inverse_layer_idx": True},
    "gpt_bigcode": {"multi_query": True},
    "gpt_bigcode+many": {"multi_query": False},
    "gpt_bigcode+unscaled": {"scale_attn_weights": False},
    "gpt_neo": {
        "attention_types": [[["global", "local"], 2]],
        "num_hidden_layers": 4,
        "window_size": 12,
    },
    "gpt_neox": {"rope_parameters": PARTIAL},
    "gpt_neox+sequential": {"use_parallel_residual": False},
    "gpt_neox_japanese": {"intermediate_multiple_size": 2, "rope_parameters": PARTIAL},
    "gpt_oss": {"layer_types": SLIDING, "rope_parameters": ROTARY},
    "gptj": {},
    "granite": {**GRANITE, **BIAS},
    "granite_swa": {
        **GRANITE,
        **BIAS,
        "layer_types": SLIDING,
        "layer_rope_theta": [10000.0, 0, 5000.0],
    },
    "granitemoe": GRANITE,
    "granitemoe_swa": {
        **GRANITE,
        "layer_types": SLIDING,
        "layer_rope_theta": [10000.0, 5000.0, 0],
        "shared_intermediate_size": 40,
    },
    "granitemoe_swa+unshared": {"shared_intermediate_size": 0},
    "granitemoehybrid": {
        **GRANITE,
        "shared_intermediate_size": 40,
        "layer_types": FULL,
        "mamba_n_heads": 2,
        "position_embedding_type": "rope",
    },
    "granitemoehybrid+norotary": {"position_embedding_type": None},
    "granitemoehybrid+dense": {"num_local_experts": 0, "num_experts": ...},
    "granitemoehybrid+mamba": {
        "layer_types": ["full_attention", "linear_attention", "full_attention"],
        "mamba_d_state": 8,
    },
    "granitemoeshared": {**GRANITE, "shared_intermediate_size": 40},
    "granitemoeshared+unshared": {"shared_intermediate_size": 0},
    "helium": BIASES,
    "hunyuan_v1_dense": BIAS,
    "hunyuan_v1_moe": {**BIAS, "moe_topk": 2},
    "hy_v3": {**BIAS, "mlp_layer_types": SPARSE},
    "hyperclovax": {**GRANITE, **BIAS, "use_post_norm": True},
    "hyperclovax+plain": {"use_post_norm": False},
    "internlm3": BIASES,
    "iquestcoder": BIASES,
    "jais2": BIASES,
    "jamba": {
        **MAMBA,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "use_mamba_kernels": False,
    },
    "kimi_linear": KIMI,
    "kolibri1": {"layer_types": SLIDING},
    "kolibri1+full": {"layer_types": FULL},
    "laguna": {**BIAS, "layer_types": SLIDING, "num_attention_heads_per_layer": [4, 6, 2]},
    "laguna+element": {"gating": "per-element"},
    "laguna+equal": {"num_attention_heads_per_layer": [4, 4, 4]},
    "lfm2": {**CONVOLUTION, "block_auto_adjust_ff_dim": False},
    "lfm2_moe": {**CONVOLUTION, "num_dense_layers": 1},
    "lfm3": {
        **BIAS,
        "num_hidden_layers": 4,
        "layer_types": ["conv", "sliding_attention", "conv", "full_attention"],
        "use_attention_gate": True,
        "use_sandwich_norm": True,
    },
    "lfm3+plain": {"use_attention_gate": False, "use_sandwich_norm": False},
    "llama": BIASES,
    "llama+plain": {"attention_bias": False, "mlp_bias": False, "num_key_value_heads": 4},
    "llama4": LLAMA4,
    "llama4_text": LLAMA4,
    "llama4_text+plain": {"use_qk_norm": False, "attn_temperature_tuning": False},
    "mellum": {**BIAS, "layer_types": SLIDING, "mlp_layer_types": SPARSE},
    "mimo_v2_flash": {
        **BIAS,
        "layer_types": SLIDING,
        "v_head_dim": 8,
        "num_key_value_heads": 1,
    },
    "mimo_v2_flash+unscaled": {"attention_value_scale": None},
    "mimo_v2_flash+full": {"layer_types": FULL},
    "minicpm3": {**LATENT, "scale_depth": 1.4, "dim_model_base": 20, "scale_emb": 3},
    "minicpm3+direct": {"q_lora_rank": None},
    "minicpm3+yarn": {"rope_parameters": LATENT_YARN},
    "minicpm3+long": LATENT_LONG,
    "minimax_m2": {"rope_parameters": PARTIAL},
    "ministral": {"layer_types": SLIDING},
    "ministral3": {
        "sliding_window": 12,
        "rope_parameters": {
            **YARN,
            "llama_4_scaling_beta": 0.9,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
        },
    },
    "ministral3+default": {
        "sliding_window": None,
        "rope_parameters": {
            **ROTARY,
            "llama_4_scaling_beta": 0.9,
            "original_max_position_embeddings": 7,
        },
    },
    "mistral": {"sliding_window": 12},
    "mixtral": {"sliding_window": 12},
    "mixtral+full": {"sliding_window": None},
    "mllama": {"num_hidden_layers": 5, "cross_attention_layers": [1, 3], "head_dim": ...},
    "mllama+first": {"cross_attention_layers": [0, 4]},
    "moshi": {"num_key_value_heads": 2},
    "moss_transcribe_diarize": {},
    "mpt": {"attn_config": {"clip_qkv": 1.0}},
    "mpt+plain": {"attn_config": {}},
    "mpt+six": {"attn_config": {"softmax_scale": 0.5}, "d_model": 72, "n_heads": 6},
    "nanochat": {**BIAS, "final_logit_softcapping": 3.0},
    "nemotron": {**BIASES, "head_dim": 16, "num_key_value_heads": 2},
    "nemotron_h": {
        "num_hidden_layers": 6,
        "layers_block_type": ["mamba", "attention", "mlp", "moe", "mamba", "attention"],
        "mamba_num_heads": 8,
        "mamba_head_dim": 12,
        "ssm_state_size": 8,
        "n_groups": 1,
        "chunk_size": 16,
        "use_mamba_kernels": False,
        "moe_shared_expert_intermediate_size": 24,
    },
    "olmo": {"clip_qkv": 1.0},
    "olmo2": {},
    "olmo3": {"layer_types": SLIDING},
    "olmo_hybrid": {**DELTA, "linear_num_key_heads": 4},
    "olmoe": {"clip_qkv": 1.0},
    "opt": {},
    "opt+plain": {"enable_bias": False, "layer_norm_elementwise_affine": False},
    "persimmon": {"hidden_size": 64},
    "persimmon+plain": {"qk_layernorm": False},
    "phi": {"rope_parameters": PARTIAL, "num_key_value_heads": 2},
    "phi3": {},
    "phi4_multimodal": {
        "head_dim": ...,
        "sliding_window": 12,
        "vision_config": {**VISION, "num_hidden_layers": 2, "crop_size": 28},
        "audio_config": {
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_blocks": 1,
            "num_attention_heads": 2,
            "ext_pw_out_channel": 32,
            "depthwise_separable_out_channel": 32,
            "nemo_conv_channels": 32,
        },
    },
    "phi4_multimodal+full": {"sliding_window": None},
    "phimoe": {**BIAS, "sliding_window": 12, "lm_head_bias": True},
    "qwen2": {},
    "qwen2_moe": {"use_sliding_window": True, "layer_types": SLIDING, "mlp_only_layers": [0]},
    "qwen3": BIAS,
    "qwen3_5": QWEN35,
    "qwen3_5_moe": QWEN35,
    "qwen3_5_moe_text": QWEN35,
    "qwen3_5_text": QWEN35,
    "qwen3_moe": {**BIAS, "use_sliding_window": True, "mlp_only_layers": [0]},
    "qwen3_moe+full": {"use_sliding_window": False},
    "qwen3_next": QWEN35,
    "recurrent_gemma": {
        "num_hidden_layers": 4,
        "block_types": ("recurrent", "attention"),
        "lru_width": 48,
        "attention_window_size": 12,
    },
    "seed_oss": {**BIASES, "attention_out_bias": True},
    "smollm3": {"no_rope_layers": [1, 0, 1]},
    "solar_open": BIAS,
    "stablelm": {
        "hidden_size": 64,
        "use_qkv_bias": True,
        "qk_layernorm": True,
        "use_parallel_residual": False,
    },
    "stablelm+parallel": {"use_parallel_residual": True},
    "stablelm+plain": {"qk_layernorm": False},
    "stablelm+plainparallel": {"qk_layernorm": False, "use_parallel_residual": True},
    "starcoder2": {"sliding_window": 12, "use_bias": True},
    "vaultgemma": {"layer_types": SLIDING},
    "xglm": {},
    "youtu": LATENT,
    "youtu+direct": {"q_lora_rank": None},
    "youtu+yarn": {"rope_parameters": LATENT_YARN},
    "youtu+long": LATENT_LONG,
    "youtu+halves": {"rope_interleave": False},
}
"""Settings by type and variant; `...` removes one of `SIZES`."""

UNSUPPORTED: dict[str, dict[str, Any]] = {
    "bloom+normed": {"apply_residual_connection_post_layernorm": True},
    "bloom+exact": {"slow_but_exact": True, "pretraining_tp": 2},
    "falcon+eageralibi": {"alibi": True},
    "gpt_bigcode+cross": {"multi_query": False, "add_cross_attention": True},
    "opt+after": {"do_layer_norm_before": False},
    "opt+unnormed": {"_remove_final_layer_norm": True},
    "opt+projected": {"word_embed_proj_dim": 32},
    "xglm+cross": {"add_cross_attention": True},
}
"""Variants of supported types that are not supported."""

FUSED_ONLY = ("falcon+alibi", "falcon+rw", "falcon+rwsix", "falcon+newalibi")
"""Variants that transformers' eager attention computes otherwise than their models were trained:
they run with "sdpa"."""

WRAPPERS: dict[str, tuple[str, str, str, dict[str, Any]]] = {
    "aria_text+wrapped": (
        "AriaForConditionalGeneration",
        "AriaConfig",
        "aria_text",
        {
            "vision_config": {**VISION, "model_type": "idefics3_vision"},
            "projector_patch_to_query_dict": {4: 2},
        },
    ),
    "cohere_compass_text+wrapped": (
        "CohereCompassForConditionalGeneration",
        "CohereCompassConfig",
        "cohere_compass_text",
        {
            "vision_config": {
                "hidden_size": 16,
                "intermediate_size": 16,
                "depth": 1,
                "num_heads": 2,
                "out_hidden_size": 48,
                "num_position_embeddings": 16,
                "deepstack_visual_indexes": [0],
            }
        },
    ),
    "fuyu+wrapped": (
        "FuyuForCausalLM",
        "FuyuConfig",
        "fuyu",
        {"image_size": 28, "patch_size": 14},
    ),
    "gemma3+wrapped": (
        "Gemma3ForConditionalGeneration",
        "Gemma3Config",
        "gemma3",
        {"vision_config": VISION, "mm_tokens_per_image": 4},
    ),
    "gemma4+wrapped": (
        "Gemma4ForConditionalGeneration",
        "Gemma4Config",
        "gemma4",
        {
            "vision_config": {
                **VISION,
                "num_key_value_heads": 2,
                "head_dim": 8,
                "global_head_dim": 8,
            },
            "audio_config": None,
        },
    ),
    "got_ocr2+wrapped": (
        "GotOcr2ForConditionalGeneration",
        "GotOcr2Config",
        "got_ocr2",
        {
            "vision_config": {
                **VISION,
                "output_channels": 16,
                "mlp_dim": 16,
                "global_attn_indexes": [0],
            }
        },
    ),
    "llama4+wrapped": (
        "Llama4ForConditionalGeneration",
        "Llama4Config",
        "llama4_text",
        {
            "vision_config": {
                **VISION,
                "intermediate_size": 64,
                "vision_output_dim": 16,
                "projector_input_dim": 16,
                "projector_output_dim": 16,
            }
        },
    ),
    "ministral3+wrapped": (
        "Mistral3ForConditionalGeneration",
        "Mistral3Config",
        "ministral3",
        {"vision_config": {**VISION, "model_type": "pixtral"}},
    ),
    "moss_transcribe_diarize+wrapped": (
        "MossTranscribeDiarizeForConditionalGeneration",
        "MossTranscribeDiarizeConfig",
        "moss_transcribe_diarize",
        {
            "audio_config": {
                "d_model": 16,
                "encoder_layers": 1,
                "encoder_attention_heads": 2,
                "encoder_ffn_dim": 16,
                "num_mel_bins": 16,
            }
        },
    ),
    "qwen3_5+wrapped": (
        "Qwen3_5ForConditionalGeneration",
        "Qwen3_5Config",
        "qwen3_5",
        {
            "vision_config": {
                "hidden_size": 16,
                "intermediate_size": 16,
                "depth": 1,
                "num_heads": 2,
                "out_hidden_size": 48,
                "num_position_embeddings": 16,
            }
        },
    ),
}
"""Multimodal models around a language model: class, configuration, settings of the language model,
and those of the wrapper."""

ALONE = ("llama4_text", "llama4", "llama4+wrapped")
"""Models whose query factor counts positions from the padding on in transformers, so that a padded
prompt does not compute as the same prompt alone."""


def names(kind: str) -> list[str]:
    """Return a type's name and those of its variants."""
    every = [*FAMILIES, *WRAPPERS]
    return [name for name in every if name.partition("+")[0] == kind]


def configuration(name: str) -> Any:
    """Return the small configuration of a type's language model, or of a wrapper around it."""
    if name in WRAPPERS:
        _, config, text, settings = WRAPPERS[name]
        inner = configuration(text).to_dict()
        return getattr(transformers, config)(text_config=inner, **settings)
    kind = name.partition("+")[0]
    default = CONFIG_MAPPING[kind]().get_text_config(decoder=True)
    given = {k: v for k, v in SIZES.items() if _takes(default, k)}
    given |= FAMILIES.get(kind, {})
    if name != kind:
        given |= (FAMILIES | UNSUPPORTED)[name]
    given |= {token: 0 for token in ("pad_token_id", "bos_token_id", "eos_token_id")}
    return type(default)(**{k: v for k, v in given.items() if v is not ...})


_MISSING = object()


def _takes(config: Any, name: str) -> bool:
    """Check that a configuration has a setting, as a number."""
    try:
        value = getattr(config, name, _MISSING)
    except Exception:  # some differ by layer, and cannot be read as one number
        return True
    absent = value is _MISSING or (value is None and name in OPTIONAL)
    return not absent and not isinstance(value, (dict, list))


def family_model(name: str) -> Any:
    """Return a random model of a type or variant, in evaluation mode.

    Norms are away from 1 and biases from 0, so that leaving one out shows.
    """
    config = configuration(name)
    attention = "sdpa" if name in FUSED_ONLY else "eager"
    options = {"attn_implementation": attention, "dtype": torch.float32}
    torch.manual_seed(0)
    if name in WRAPPERS:
        model = getattr(transformers, WRAPPERS[name][0])._from_config(config, **options)
    else:
        try:
            model = AutoModelForCausalLM.from_config(config, **options)
        except ValueError:  # the table has this class under the type of a wrapper alone
            kind = name.partition("+")[0]
            model = getattr(transformers, CLASSES[kind])._from_config(config, **options)
    draw_weights(model)
    with torch.no_grad():
        for label, buffer in model.named_buffers():
            if label.endswith("layer_scalar"):  # Gemma 4's factors on its blocks
                buffer.copy_(torch.rand_like(buffer) + 0.4)
    return model.eval().requires_grad_(False)
