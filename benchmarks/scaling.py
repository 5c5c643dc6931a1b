"""How the sweep's time grows with the number of heads and with the length of prompts.

Random models of one width with more and more layers or heads, beside one forward per head
on PyTorch's hooks; and the demo model on longer and longer prompts. A slope is that of a
straight line through the logarithms: 1 where time grows in proportion, 2 as the square.

    python benchmarks/scaling.py --promote
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import common
import floors
import numpy as np
import peers
import shapes
import torch

import twotower as tt
from twotower.models import Model

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


def slope(x: Sequence[float], y: Sequence[float]) -> float:
    """Of a straight line through the logarithms, by least squares."""
    return round(float(np.polyfit(np.log(x), np.log(y), 1)[0]), 2)


@torch.no_grad()
def one_model(shape: str, layers: int, heads: int, rounds: int) -> dict[str, Any]:
    model = shapes.random_model(config(shape, layers, heads), "cpu", torch.float32)
    prompts = shapes.prompts_near(model, TOKENS, PROMPTS)
    one = prompts[:1]
    mean = float(prompts.lengths.mean())
    unit, found = common.ratios(
        floors.plain_of(model, prompts),
        {"sweep": lambda: tt.head_effects(model, prompts, logprobs=False)},
        rounds,
    )
    chosen = model.heads[:: -(-len(model.heads) // HOOKED)]
    alone, by_head = common.ratios(
        lambda: [floors.plain_of(model, one)() for _ in range(4)],
        {"hooks": lambda: peers.with_hooks(model, one, "last", chosen)},
        rounds,
    )
    hooked = by_head["hooks"] * len(model.heads) / len(chosen)
    row = {
        "shape": shape,
        "layers": layers,
        "heads_of_a_layer": heads,
        "heads": layers * heads,
        "tokens": round(mean, 1),
        "plain_seconds": round(unit / PROMPTS, 5),
        "sweep_seconds": round(found["sweep"] * unit / PROMPTS, 5),
        "sweep_forwards": round(found["sweep"], 3),
        "hooks_seconds": round(hooked * alone, 4),
        "hooks_forwards": round(4 * hooked, 1),
    }
    print(row, flush=True)
    return row


def by_heads(rounds: int) -> list[dict[str, Any]]:
    """Series of random models, with their slopes against the number of heads."""
    measured = {
        (shape, *size): one_model(shape, *size, rounds)
        for shape in ("Llama", "GPT-2")
        for size in sorted({size for grid in GRIDS.values() for size in grid})
    }
    series = []
    for shape in ("Llama", "GPT-2"):
        for growing, grid in GRIDS.items():
            rows = [measured[shape, *size] for size in grid]
            heads = [r["heads"] for r in rows]
            names = ("plain_seconds", "sweep_seconds", "hooks_seconds", "sweep_forwards")
            slopes = {x: slope(heads, [r[x] for r in rows]) for x in names}
            series.append({"shape": shape, "growing": growing, "slopes": slopes, "models": rows})
    return series


def by_length(model: Model, rounds: int) -> dict[str, Any]:
    """The last-position sweep of the demo model on prompts of several lengths."""
    rows = []
    for length, n in LENGTHS:
        prompts = floors.prompts_of(model, length, n)
        unit, found = common.ratios(
            floors.plain_of(model, prompts),
            {"sweep": lambda p=prompts: tt.head_effects(model, p, logprobs=False)},
            rounds,
        )
        rows.append(
            {
                "tokens": round(float(prompts.lengths.mean()), 1),
                "plain_seconds": round(unit / n, 4),
                "sweep_seconds": round(found["sweep"] * unit / n, 4),
                "sweep_forwards": round(found["sweep"], 3),
            }
        )
        print(rows[-1], flush=True)
    tokens = [r["tokens"] for r in rows]
    names = ("plain_seconds", "sweep_seconds", "sweep_forwards")
    return {"slopes": {x: slope(tokens, [r[x] for r in rows]) for x in names}, "lengths": rows}


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
