"""What the proof of every batch costs, and the look at a model's state.

Each measure is taken with the proof and without it, in turns, in one process; what is reported
is the median over rounds of each round's ratio, by the processor's time, which other work on the
machine disturbs less than the clock's. With `--before FOLDER`, a checkout of an older version, the
same is measured with that version, in processes that take turns.

    python benchmarks/proof.py --promote
    python benchmarks/proof.py --before ../before     # beside a build without proofs
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import common
import torch

import twotower as tt

LIMIT = 1.02
"""What a measure with its proof may take, over one without."""

ALONE = """
import sys, time, torch, json
import twotower as tt
torch.set_num_threads(int(sys.argv[1]))
model = tt.load(sys.argv[2])
prompts = tt.build_prompts(model, tt.load_task("animals-cities"), shots=9, n=int(sys.argv[3]))
jobs = {
    "predict": lambda: tt.predict(model, prompts),
    "head effects, margins": lambda: tt.head_effects(model, prompts, logprobs=False),
    "all of it (analyze)": lambda: tt.analyze(model, prompts),
}
found = {}
for name, job in jobs.items():
    job()
    times = []
    for _ in range(3):
        start = time.process_time()
        job()
        times.append(time.process_time() - start)
    found[name] = min(times)
print(json.dumps(found))
"""


def main() -> None:
    parser = common.arguments(__doc__.splitlines()[0], "proof")
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--before", type=Path, help="a checkout of an older version")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    model = tt.load(options.model)
    prompts = tt.build_prompts(model, tt.load_task("animals-cities"), shots=9, n=options.prompts)
    few = prompts[:2]
    jobs: dict[str, Callable[[], object]] = {
        "predict": lambda: tt.predict(model, prompts),
        "QK and OV of all heads": lambda: tt.analyze(model, prompts, measures=("qk", "ov")),
        "log-probability increase": lambda: tt.attribution(model, prompts),
        "head effects, margins": lambda: tt.head_effects(model, prompts, logprobs=False),
        "head effects, margins and log-probabilities": lambda: tt.head_effects(model, prompts),
        "all of it (analyze)": lambda: tt.analyze(model, prompts),
        "head effects at label positions": lambda: tt.head_effects(
            model, few, "labels", logprobs=False
        ),
    }
    ratios: dict[str, list[float]] = {name: [] for name in jobs}
    for round_ in range(options.rounds + 1):
        for name, job in jobs.items():
            times = {}
            # The order changes, so that neither is always the one that warms up.
            for proof in (True, False) if round_ % 2 else (False, True):
                with tt.set_options(proof=proof):
                    times[proof] = processor_seconds(job)
            if round_:
                ratios[name].append(times[True] / times[False])
    looks = [common.seconds(model.look) for _ in range(20)]
    result = {
        "machine": common.machine(options.threads),
        "model": options.model,
        "prompts": len(prompts),
        "tokens": prompts.n_positions,
        "rounds": options.rounds,
        "with_proof": {name: median(values) for name, values in ratios.items()},
        "look_milliseconds": 1000 * median(looks),
        "look_7b_milliseconds": 1000 * look_at_seven_billion(),
        "second_forward_seconds": second_forward(model, prompts),
    }
    if options.before:
        result["over_older_version"] = against(options)
    for name, ratio in result["with_proof"].items():
        print(f"{name:45s} {ratio:6.3f} of the time without proof (limit {LIMIT})")
    print(f"{'a look at the state':45s} {result['look_milliseconds']:6.2f} ms")
    print(
        f"{'a look at the state of Llama-7B, in bfloat16':45s} {result['look_7b_milliseconds']:6.2f} ms"
    )
    print(f"{'proving a new state':45s} {result['second_forward_seconds']:6.3f} s")
    for name, ratio in result.get("over_older_version", {}).items():
        print(f"{name:45s} {ratio:6.3f} of an older version's time")
    common.finish(result, "proof", options)


def processor_seconds(job: Callable[[], object]) -> float:
    """Processor time of a call."""
    start = time.process_time()
    job()
    return time.process_time() - start


def second_forward(model: tt.Model, prompts: tt.Prompts) -> float:
    """Seconds that the first measure in a new state takes longer: label directions and all."""
    found = []
    for _ in range(3):
        model.cache.clear()
        first = common.seconds(lambda: tt.predict(model, prompts[:1]))
        found.append(first - common.seconds(lambda: tt.predict(model, prompts[:1])))
    return median(found)


def look_at_seven_billion() -> float:
    """Seconds that the state of Llama-7B takes; its weights are never touched otherwise."""
    from transformers import AutoConfig

    from twotower.models.random_weights import SHAPES, on_meta

    module = on_meta(AutoConfig.from_pretrained(SHAPES["llama-7b"]), torch.bfloat16)
    # Memory that is asked for and not written: the system gives the same page of zeros.
    module = module.to_empty(device="cpu")
    tokenizer = tt.load("smollm2-135m", check=False).tokenizer
    model = tt.load(module, tokenizer=tokenizer, check=False)
    return median(common.seconds(model.look) for _ in range(10))


def against(options: object) -> dict[str, float]:
    """Processor time of measures over that of an older version, in processes by turns."""
    own = Path(__file__).parents[1]
    arguments = [str(options.threads), options.model, str(options.prompts)]
    found: dict[str, list[float]] = {}
    for _ in range(options.rounds):
        times = []
        for folder in (own, options.before.resolve()):
            environment = {**os.environ, "PYTHONPATH": str(folder)}
            command = [sys.executable, "-c", ALONE, *arguments]
            done = subprocess.run(command, env=environment, capture_output=True, check=True)
            times.append(json.loads(done.stdout.splitlines()[-1]))
        for name, seconds in times[0].items():
            found.setdefault(name, []).append(seconds / times[1][name])
    return {name: median(values) for name, values in found.items()}


if __name__ == "__main__":
    main()
