"""How well attribution patching finds the strongest edges, against their exact effects.

Attribution patching estimates an edge's effect to first order: the margin's derivative along what
the source writes (Nanda 2023; Syed et al. 2023, arXiv:2310.10348). Here it is taken as a difference
quotient of the exact effects: of the source's output multiplied by 1 - STEP, divided by STEP.

    python benchmarks/edge_estimates.py --threads 1 --promote
"""

from __future__ import annotations

import common
import numpy as np
import torch
from scipy.stats import spearmanr

import twotower as tt

STEP = 0.01
"""Part of a source's output that is taken out for the estimate."""

STRONGEST = (10, 30, 100, 300)


def main() -> None:
    parser = common.arguments(__doc__.splitlines()[0], "edge_estimates")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--shots", type=int, default=8)
    parser.add_argument("--heads", type=int, default=12)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model = tt.load(options.model)
    task = tt.load_task("animals-cities")
    prompts = tt.build_prompts(model, task, shots=options.shots, n=options.prompts)
    heads = tt.in_context_heads(tt.head_effects(model, prompts, logprobs=False), options.heads)
    found = {}
    for name, to in (("exact", tt.Zero()), ("estimate", tt.Times(1 - STEP))):
        edges = tt.edge_effects(model, prompts, None, heads, positions="labels", to=to)
        found[name] = edges["margin_drop"].mean("prompt")
    found["estimate"] = found["estimate"] / STEP
    result = {
        "machine": common.machine(options.threads),
        "model": options.model,
        "prompts": options.prompts,
        "heads": [str(head) for head in heads],
        "step": STEP,
        "edges": {},
    }
    for into in ("q", "k", "v"):
        exact, estimate = (
            found[name].sel(into=into).values.ravel() for name in ("exact", "estimate")
        )
        there = np.isfinite(exact)
        exact, estimate = exact[there], estimate[there]
        order, guessed = (np.argsort(-abs(x), kind="stable") for x in (exact, estimate))
        result["edges"][into] = {
            "number": len(exact),
            "rank correlation of sizes": round(float(spearmanr(abs(exact), abs(estimate))[0]), 3),
            "recall": {
                k: round(len({*order[:k]} & {*guessed[:k]}) / k, 3)
                for k in STRONGEST
                if k <= len(exact)
            },
            "same sign among the strongest 100": round(
                float((np.sign(exact) == np.sign(estimate))[order[:100]].mean()), 3
            ),
            "strongest exact": round(float(abs(exact).max()), 3),
            "its estimate": round(float(abs(estimate)[order[0]]), 3),
        }
    print(result)
    common.finish(result, "edge_estimates", options)


if __name__ == "__main__":
    main()
