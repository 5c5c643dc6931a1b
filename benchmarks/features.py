"""How near sweeps of models with further features come to their arithmetic floors.

As `floors.py`, on random models of one size that have softcaps, sinks, biases by distance, latent
attention, or mixers of positions. Times are the processor's, on one thread.

    python benchmarks/features.py --promote
"""

from __future__ import annotations

import time
from statistics import mean
from typing import Any

import common
import psutil
import shapes
import torch
import transformers
from floor import Floor
from floors import row

import twotower as tt
from twotower.models import Model

N_LAYERS = 8
N_HEADS = 12
WIDTH = 768
MLP = 2048
WINDOW = 64
"""Shorter than the prompts, so that windows act."""

LAST = {100: 2, 500: 1}
"""Prompts by their length, for sweeps at the last position."""
ALL = {100: 1}
"""The same for sweeps at all positions."""

ALTERNATING = ["sliding_attention", "full_attention"] * (N_LAYERS // 2)
MIXING = ["linear_attention", "linear_attention", "linear_attention", "full_attention"]


def configurations() -> dict[str, Any]:
    """A configuration for each feature."""
    sizes = {
        "vocab_size": shapes.SMALL_VOCABULARY,
        "hidden_size": WIDTH,
        "intermediate_size": MLP,
        "num_hidden_layers": N_LAYERS,
        "num_attention_heads": N_HEADS,
        "num_key_value_heads": 4,
        "head_dim": WIDTH // N_HEADS,
        "max_position_embeddings": 2048,
    }
    without_groups = sizes | {"num_key_value_heads": N_HEADS}
    del without_groups["head_dim"]
    windows = {"layer_types": ALTERNATING, "sliding_window": WINDOW}
    return {
        "Llama": transformers.LlamaConfig(**sizes),
        "Gemma 2: softcaps, windows": transformers.Gemma2Config(
            **sizes, **windows, query_pre_attn_scalar=WIDTH // N_HEADS
        ),
        "Granite with sinks, windows": transformers.GraniteSWAConfig(
            **sizes, **windows, layer_rope_theta=[10000.0] * N_LAYERS
        ),
        "BLOOM: ALiBi": transformers.BloomConfig(
            vocab_size=shapes.SMALL_VOCABULARY, hidden_size=WIDTH, n_layer=N_LAYERS, n_head=N_HEADS
        ),
        "DeepSeek V3: latent attention": transformers.DeepseekV3Config(
            **without_groups,
            first_k_dense_replace=N_LAYERS,
            q_lora_rank=384,
            kv_lora_rank=192,
            qk_rope_head_dim=32,
            qk_nope_head_dim=64,
            v_head_dim=64,
        ),
        "Qwen3.5: delta rule": transformers.Qwen3_5TextConfig(
            **sizes,
            layer_types=MIXING * (N_LAYERS // 4),
            linear_num_key_heads=N_HEADS // 2,
            linear_num_value_heads=N_HEADS,
            linear_key_head_dim=64,
            linear_value_head_dim=64,
        ),
        "LFM2: convolutions": transformers.Lfm2Config(
            **{k: v for k, v in sizes.items() if k != "head_dim"},
            layer_types=[kind.replace("linear_attention", "conv") for kind in MIXING]
            * (N_LAYERS // 4),
            block_auto_adjust_ff_dim=False,
        ),
        "Jamba: Mamba": transformers.JambaConfig(
            **{k: v for k, v in sizes.items() if k != "head_dim"},
            attn_layer_period=4,
            attn_layer_offset=3,
            num_experts=1,
            num_experts_per_tok=1,
        ),
    }


def sweeps(model: Model, rounds: int) -> list[dict[str, Any]]:
    """Sweeps of all heads at the last position, and at all."""
    floor, found = Floor(model), []
    for positions, lengths in (("last", LAST), ("all", ALL)):
        for length, n in lengths.items():
            prompts = shapes.prompts_near(model, length, n)
            tokens = float(prompts.lengths.mean())
            last = positions == "last"
            unit, ratios = common.ratios(
                common.plain_of(model, prompts, shared=not last),
                {
                    "x": lambda p=prompts, at=positions: tt.head_effects(
                        model, p, at, logprobs=False
                    )
                },
                rounds if last else 1,
                warm=not last,
                repeats=1 if last else 5,
                clock=time.process_time,
            )
            least = floor.plain(tokens) + floor.rows(tokens, 1 if last else tokens)
            found.append(row(positions, tokens, n, unit, ratios["x"], least / floor.plain(tokens)))
    return found


def main() -> None:
    parser = common.arguments(__doc__.splitlines()[0], "features")
    parser.add_argument("--only", help="models whose name has this in it")
    parser.set_defaults(threads=1, rounds=3)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    models, loads = {}, []
    for name, config in configurations().items():
        if options.only and options.only not in name:
            continue
        print(name, flush=True)
        model = shapes.random_model(config, "cpu", torch.float32)
        models[name] = {"heads": len(model.heads), "sweeps": sweeps(model, options.rounds)}
        loads.append(psutil.getloadavg()[0] - options.threads)
    result = {
        "machine": common.machine(options.threads),
        "load": round(max(0.0, mean(loads)), 1),  # of other processes
        "width": WIDTH,
        "layers": N_LAYERS,
        "models": models,
    }
    common.finish(result, "features", options)


if __name__ == "__main__":
    main()
