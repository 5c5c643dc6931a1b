"""What the proof of every batch costs, and the look at a model's state.

A measure with and without its proof differ by a few percent, less than two runs of the same measure
on a shared machine. So the time is taken inside one run: the seconds in the proof's own code, and
of a sweep's rows the share of those in which nothing is changed. With `--before FOLDER`, a checkout
of an older version, measures are also timed beside that version, in processes that take turns.

    python benchmarks/proof.py --promote
    python benchmarks/proof.py --before ../before     # beside a build without proofs
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from statistics import median
from unittest import mock

import common
import torch

import twotower as tt
from twotower.sweep.sweep import Sweep
from twotower.walk import judge
from twotower.walk.proof import Proof

BESIDE = 4
"""Number of prompts of measures that are timed beside an older version."""

LIMIT = 0.02
"""Largest share of a measure's time that its proof may add."""

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
    costs = {name: cost(job, options.rounds) for name, job in jobs.items()}
    wide = wide_model()
    four = tt.build_prompts(wide, tt.load_task("animals-cities"), shots=9, n=4)
    costs["predict, as wide as Llama-7B"] = cost(lambda: tt.predict(wide, four), options.rounds)
    looks = [common.seconds(model.look) for _ in range(20)]
    result = {
        "machine": common.machine(options.threads),
        "model": options.model,
        "prompts": len(prompts),
        "tokens": prompts.n_positions,
        "rounds": options.rounds,
        "cost": costs,
        "look_milliseconds": 1000 * median(looks),
        "look_7b_milliseconds": 1000 * look_at_seven_billion(),
        "second_forward_seconds": second_forward(model, prompts),
    }
    if options.before:
        result["over_older_version"] = against(options)
    for name, added in result["cost"].items():
        print(f"{name:45s} {added:6.2%} beside the measure itself (limit {LIMIT:.0%})")
    print(f"{'a look at the state':45s} {result['look_milliseconds']:6.2f} ms")
    print(f"{'a look at the state of Llama-7B':45s} {result['look_7b_milliseconds']:6.2f} ms")
    print(f"{'proving a new state':45s} {result['second_forward_seconds']:6.3f} s")
    for name, ratio in result.get("over_older_version", {}).items():
        print(f"{name:45s} {ratio:6.3f} of an older version's time")
    common.finish(result, "proof", options)


def cost(job: Callable[[], object], rounds: int) -> float:
    """Seconds of a measure's proof over those of the measure itself; median over rounds."""
    job()
    found = []
    for _ in range(rounds):
        with seconds_of_proof() as proof:
            whole = common.seconds(job)
        found.append(sum(proof) / (whole - sum(proof)))
    return median(found)


@contextmanager
def seconds_of_proof() -> Iterator[list[float]]:
    """Collect the seconds that pass in the code of the proof."""
    spent: list[float] = []

    def timed(function: Callable[..., object]) -> Callable[..., object]:
        @wraps(function)
        def run(*arguments: object) -> object:
            start = time.perf_counter()
            found = function(*arguments)
            spent.append(time.perf_counter() - start)
            return found

        return run

    advance = Sweep._advance

    def shared(self: Sweep, clean: object, rows: object, chunk: int) -> object:
        start = time.perf_counter()
        found = advance(self, clean, rows, chunk)
        if found is not None and self.unchanged[chunk][clean.index] is not None:
            spent.append((time.perf_counter() - start) / found.shape[1])
        return found

    with (
        mock.patch.object(Proof, "layer", timed(Proof.layer)),
        mock.patch.object(Proof, "finish", timed(Proof.finish)),
        mock.patch.object(Sweep, "_check_unchanged", timed(Sweep._check_unchanged)),
        mock.patch.object(Sweep, "_advance", shared),
        mock.patch.object(judge, "judge", timed(judge.judge)),
        mock.patch.object(tt.Model, "look", timed(tt.Model.look)),
    ):
        yield spent


def wide_model() -> tt.Model:
    """Two random layers as wide as Llama-7B's."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from twotower.models.random_weights import SHAPES

    tokenizer = tt.load("smollm2-135m", check=False).tokenizer
    config = AutoConfig.from_pretrained(SHAPES["llama-7b"])
    config.num_hidden_layers, config.vocab_size = 2, len(tokenizer)
    config.pad_token_id = config.bos_token_id = config.eos_token_id = 0
    module = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return tt.load(module.eval().requires_grad_(False), tokenizer=tokenizer)


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
    arguments = [str(options.threads), options.model, str(BESIDE)]
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
