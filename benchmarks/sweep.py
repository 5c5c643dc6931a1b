"""What the measures cost, in plain forwards.

A plain forward is the transformers model itself on the same batch: its own attention
kernel, no cache, logits of the last position only. Everything is timed in turns in one
process, so that a change of the machine's speed meets all alike; what is reported is the
median over rounds of each round's ratio.

    python benchmarks/sweep.py --promote
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from statistics import median

import common
import torch

import twotower as tt

LIMITS = {
    "head effects, margins and log-probabilities": 4.0,
    "QK and OV of all heads": 1.5,
}
LOAD_LIMIT = 5.0


def main() -> None:
    parser = common.arguments(__doc__.splitlines()[0], "sweep")
    parser.add_argument("--task", default="animals-cities")
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--shots", type=int, default=9)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    model = tt.load(options.model)
    task = tt.load_task(options.task)
    prompts = tt.build_prompts(model, task, shots=options.shots, n=options.prompts)

    def towers() -> None:
        tt.analyze(model, prompts, measures=("qk", "ov"))

    jobs: dict[str, Callable[[], object]] = {
        "plain forward": common.plain_of(model, prompts),
        "predict": lambda: tt.predict(model, prompts),
        "head effects, margins": lambda: tt.head_effects(model, prompts, logprobs=False),
        "head effects, margins and log-probabilities": lambda: tt.head_effects(model, prompts),
        "QK and OV of all heads": towers,
        "log-probability increase": lambda: tt.attribution(model, prompts),
        "all of it (analyze)": lambda: tt.analyze(model, prompts),
    }
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    for round_ in range(options.rounds + 1):
        for name, job in jobs.items():
            start = time.perf_counter()
            job()
            if round_:  # the first round warms up
                seconds[name].append((time.perf_counter() - start) / len(prompts))
    rows = {
        name: {
            "seconds_per_prompt": median(times),
            "forwards": median(t / p for t, p in zip(times, seconds["plain forward"], strict=True)),
        }
        for name, times in seconds.items()
    }
    load = load_seconds(options.model, options.threads)
    result = {
        "machine": common.machine(options.threads),
        "model": options.model,
        "heads": model.n_layers * model.n_heads,
        "prompts": len(prompts),
        "tokens": {"mean": float(prompts.lengths.mean()), "most": prompts.n_positions},
        "rounds": options.rounds,
        "load_seconds": load,
        "measures": rows,
    }
    print(f"{'':45s} {'s/prompt':>9s} {'forwards':>9s} {'limit':>6s}")
    for name, row in rows.items():
        limit = f"{LIMITS[name]:.1f}" if name in LIMITS else ""
        print(f"{name:45s} {row['seconds_per_prompt']:9.3f} {row['forwards']:9.2f} {limit:>6s}")
    print(f"{'load from the cache, check included':45s} {load:9.2f} {'s':>9s} {LOAD_LIMIT:6.1f}")
    common.finish(result, "sweep", options)
    missed = [name for name, limit in LIMITS.items() if rows[name]["forwards"] > limit]
    if load > LOAD_LIMIT:
        missed.append("load")
    if missed:
        sys.exit(f"over the limit: {', '.join(missed)}")


def load_seconds(name: str, threads: int) -> float:
    """Median time of `twotower.load` in a fresh process, imports apart."""
    code = (
        f"import time, torch, nnsight, transformers; torch.set_num_threads({threads})\n"
        "import twotower as tt; tt.load\n"
        f"start = time.perf_counter(); tt.load({name!r}); print(time.perf_counter() - start)"
    )
    runs = [
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        for _ in range(3)
    ]
    return median(float(run.stdout.split()[-1]) for run in runs)


if __name__ == "__main__":
    main()
