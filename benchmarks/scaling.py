"""How the sweep's time grows with the number of heads and with the length of prompts.

Random models of one width with more and more layers or heads, beside one forward per head
on PyTorch's hooks; and the demo model on longer and longer prompts. A slope is that of a
straight line through the logarithms: 1 where time grows in proportion, 2 as the square.
Each time is the least of some rounds, in which all jobs take turns.

    python benchmarks/scaling.py --promote
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import common
import floors
import numpy as np
import peers
import shapes
import torch

import twotower as tt
from twotower.models import Model

SHAPES = ("Llama", "GPT-2")
WIDTH, TOKENS, PROMPTS = 384, 100, 4
GRIDS = {
    # (layers, heads of a layer)
    "layers": [(4, 8), (8, 8), (12, 8), (16, 8), (24, 8)],
    "heads": [(8, 2), (8, 4), (8, 8), (8, 16), (8, 24)],
    "both": [(4, 4), (8, 8), (12, 12), (16, 16), (24, 24)],
}
HOOKED = 16
"""Heads that hooks knock out at most, spread over all; their time counts for all."""
LENGTHS = ((50, 8), (100, 8), (200, 4), (500, 2), (1000, 1), (2000, 1))


def config(shape: str, layers: int, heads: int) -> Any:
    if shape == "Llama":
        return shapes.llama(layers, heads, WIDTH, 4 * WIDTH, shapes.SMALL_VOCABULARY)
    return shapes.gpt2(layers, heads, WIDTH, shapes.SMALL_VOCABULARY)


@torch.no_grad()
def fastest(jobs: Mapping[Any, Callable[[], object]], rounds: int) -> dict[Any, float]:
    """Least seconds of each job; they take turns, so that a slow minute meets all alike.

    One round before those counted warms up.
    """
    times: dict[Any, list[float]] = {name: [] for name in jobs}
    for round_ in range(rounds + 1):
        for name, job in jobs.items():
            took = common.seconds(job)
            if round_:
                times[name].append(took)
        print(f"round {round_} of {rounds}", flush=True)
    return {name: min(found) for name, found in times.items()}


def by_heads(rounds: int) -> list[dict[str, Any]]:
    """Series of random models, with their slopes against the number of heads."""
    sizes = sorted({size for grid in GRIDS.values() for size in grid})
    jobs: dict[Any, Callable[[], object]] = {}
    chosen, tokens = {}, {}
    for at in ((shape, *size) for shape in SHAPES for size in sizes):
        model = shapes.random_model(config(*at), "cpu", torch.float32)
        prompts = shapes.prompts_near(model, TOKENS, PROMPTS)
        heads = model.heads[:: -(-len(model.heads) // HOOKED)]
        chosen[at], tokens[at] = len(heads), float(prompts.lengths.mean())
        jobs[at, "plain"] = common.plain_of(model, prompts)
        jobs[at, "sweep"] = lambda m=model, p=prompts: tt.head_effects(m, p, logprobs=False)
        jobs[at, "hooks"] = lambda m=model, p=prompts[:1], h=heads: peers.with_hooks(
            m, p, "last", h
        )
    took = fastest(jobs, rounds)
    rows = {}
    for at in chosen:
        shape, layers, heads = at
        plain, sweep = (took[at, x] / PROMPTS for x in ("plain", "sweep"))
        rows[at] = {
            "layers": layers,
            "heads_of_a_layer": heads,
            "heads": layers * heads,
            "tokens": round(tokens[at], 1),
            "plain_seconds": round(plain, 5),
            "sweep_seconds": round(sweep, 5),
            "sweep_forwards": round(sweep / plain, 3),
            # One more forward of the clean prompt stands beside those of the heads.
            "hooks_seconds": round(took[at, "hooks"] * (layers * heads + 1) / (chosen[at] + 1), 4),
        }
        print(shape, rows[at], flush=True)
    series = []
    for shape in SHAPES:
        for growing, grid in GRIDS.items():
            models = [rows[shape, *size] for size in grid]
            series.append(
                {
                    "shape": shape,
                    "growing": growing,
                    "slopes": slopes([r["heads"] for r in models], models),
                    "models": models,
                }
            )
    return series


def slopes(x: Sequence[float], rows: list[dict[str, Any]]) -> dict[str, float]:
    """Of a straight line through the logarithms, by least squares, for every time."""
    names = [name for name in rows[0] if name.endswith(("_seconds", "_forwards"))]
    return {
        name: round(float(np.polyfit(np.log(x), np.log([r[name] for r in rows]), 1)[0]), 2)
        for name in names
    }


def by_length(model: Model, rounds: int) -> dict[str, Any]:
    """The last-position sweep of the demo model on prompts of several lengths."""
    sets = [floors.prompts_of(model, length, n) for length, n in LENGTHS]
    jobs: dict[Any, Callable[[], object]] = {}
    for i, prompts in enumerate(sets):
        jobs[i, "plain"] = common.plain_of(model, prompts)
        jobs[i, "sweep"] = lambda p=prompts: tt.head_effects(model, p, logprobs=False)
    took = fastest(jobs, rounds)
    rows = []
    for i, prompts in enumerate(sets):
        plain, sweep = (took[i, x] / len(prompts) for x in ("plain", "sweep"))
        rows.append(
            {
                "tokens": round(float(prompts.lengths.mean()), 1),
                "plain_seconds": round(plain, 4),
                "sweep_seconds": round(sweep, 4),
                "sweep_forwards": round(sweep / plain, 3),
            }
        )
        print(rows[-1], flush=True)
    return {"slopes": slopes([r["tokens"] for r in rows], rows), "lengths": rows}


def main() -> None:
    options = common.arguments(__doc__.splitlines()[0], "scaling").parse_args()
    torch.set_num_threads(options.threads)
    result = {
        "machine": common.machine(options.threads),
        "model": options.model,
        "width": WIDTH,
        "by_heads": by_heads(options.rounds),
        "by_length": by_length(tt.load(options.model), options.rounds),
    }
    common.finish(result, "scaling", options)


if __name__ == "__main__":
    main()
