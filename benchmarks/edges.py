"""Cost of exact edges into the queries of all heads, and into q, k and v of some heads.

Units are plain forwards of the same prompts, in one process. The floor counts what edges cannot do
without: each edge is one row of one position that passes through the blocks from its target's on,
at the plain forward's own speed for a position of a block (unembedding left out of both). Rows
start inside their block, so the floor counts the target's block as whole; reading, which makes the
targets' outputs, is not in the floor. Edges that are cut in one run (`CutEdges`) have no floor;
where heads lose different sources, each is computed by itself.

    python benchmarks/edges.py --threads 1 --promote
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import common
import numpy as np
import torch

import twotower as tt
from twotower.edits.cut import all_edges
from twotower.measures.edges import edges_of
from twotower.models import Model


def floor_of(model: Model, n_positions: int, edges: list[tuple[int, int, int, int]]) -> float:
    """Plain forwards that the rows of edges take at least."""
    blocks = sum(model.n_layers - layer for layer, *_ in edges)
    return blocks / (model.n_layers * n_positions)


def main() -> None:
    parser = common.arguments(__doc__.splitlines()[0], "edges")
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--shots", type=int, default=9)
    parser.add_argument("--heads", type=int, default=12)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    tt.set_options(progress=False)
    model = tt.load(options.model)
    task = tt.load_task("animals-cities")
    prompts = tt.build_prompts(model, task, shots=options.shots, n=options.prompts)
    effects = tt.head_effects(model, prompts, logprobs=False)
    heads = tt.in_context_heads(effects, options.heads)
    length = float(np.mean(prompts.lengths))

    def job(
        sources: str | None, targets: list[tt.Head] | None, into: str, at: str
    ) -> Callable[[], object]:
        return lambda: tt.edge_effects(model, prompts, sources, targets, into=into, positions=at)

    jobs = {"heads into queries of all heads": job("heads", None, "q", "all")}
    counted = {"heads into queries of all heads": edges_of(model, "heads", None, "q")}
    for into, words in (("q", "queries"), ("k", "keys"), ("v", "values")):
        for at in ("all",) if into == "q" else ("labels", "all"):
            where = "" if into == "q" else f" at {'all positions' if at == 'all' else at}"
            name = f"everything into {words} of {options.heads} heads{where}"
            jobs[name] = job(None, heads, into, at)
            counted[name] = edges_of(model, None, heads, into)
    every = all_edges(model)
    half = [every[i] for i in np.random.default_rng(0).permutation(len(every))[::2]]
    cut = {
        "predictions with all edges cut": tt.CutEdges(every),
        "predictions with a random half of them cut": tt.CutEdges(half),
    }
    for name, edit in cut.items():
        jobs[name] = partial(tt.predict, model, prompts, edit)
    clock = time.process_time if options.threads == 1 else time.perf_counter
    second, found = common.ratios(
        common.plain_of(model, prompts), jobs, options.rounds, clock=clock
    )
    floors = {name: floor_of(model, length, edges.listed) for name, edges in counted.items()}
    result = {
        "machine": common.machine(options.threads),
        "model": options.model,
        "prompts": options.prompts,
        "tokens": round(length, 1),
        "heads": [str(head) for head in heads],
        "plain_forward_seconds": round(second / options.prompts, 3),
        "edges": {name: len(edges.listed) for name, edges in counted.items()}
        | {name: len(edit.edges) for name, edit in cut.items()},
        "plain_forwards": {name: round(ratio, 2) for name, ratio in found.items()},
        "floor": {name: round(value, 2) for name, value in floors.items()},
        "over_floor": {name: round(found[name] / floors[name], 3) for name in floors},
    }
    print(result)
    common.finish(result, "edges", options)


if __name__ == "__main__":
    main()
