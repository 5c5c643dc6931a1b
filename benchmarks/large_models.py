"""Models of seven billion parameters where there is no GPU: time, memory, and what was planned.

Random weights in the shapes of Llama-7B and GPT-J, quantized as they are made. Each runs in a
process of its own, by `twotower bench`, so that peaks are those of one model.

    python benchmarks/large_models.py --promote
    python benchmarks/large_models.py --only llama-7b-nf4
"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import common

from twotower.sizing.plan import make_plan

RUNS: dict[str, dict[str, str]] = {
    "llama-7b-nf4": {"model": "llama-7b", "quantization": "nf4"},
    "llama-7b-bfloat16": {"model": "llama-7b", "dtype": "bfloat16"},
    "gpt-j-6b-nf4": {"model": "gpt-j-6b", "quantization": "nf4"},
}
TOKENS, BATCH = 32, 1
SLACK, SPARE = 1.25, 1.5 * 2**30
"""Most resident memory that is allowed: so many times the weights, and so much beside them."""


def measured(settings: dict[str, str], threads: int, rounds: int) -> dict[str, Any]:
    """What `twotower bench` says of a model."""
    command = [sys.executable, "-m", "twotower.cli", "bench", settings["model"]]
    command += ["--weights", "random", "--json", "--threads", str(threads)]
    command += ["--prompt-tokens", str(TOKENS), "--batch", str(BATCH), "--rounds", str(rounds)]
    for name in ("dtype", "quantization"):
        if name in settings:
            command += [f"--{name}", settings[name]]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def main() -> None:
    parser = common.arguments(__doc__.splitlines()[0], "large_models")
    parser.add_argument("--only", nargs="+", choices=list(RUNS), default=list(RUNS))
    parser.set_defaults(rounds=1)
    options = parser.parse_args()
    if options.promote and set(options.only) != set(RUNS):
        parser.error("--promote takes the results of all models")
    result: dict[str, Any] = {"machine": common.machine(options.threads), "models": {}}
    missed = []
    for name in options.only:
        found = measured(RUNS[name], options.threads, options.rounds)
        tokens = round(found["tokens"])
        plan = make_plan(
            RUNS[name]["model"],
            dtype=RUNS[name].get("dtype"),
            quantization=RUNS[name].get("quantization"),
            prompt_tokens=tokens,
            batch=BATCH,
            prompts=BATCH,
        )
        peak = max(stage["peak_bytes"]["cpu"] for stage in found["stages"])
        allowed = SLACK * found["weights_bytes"] + SPARE
        found |= {"peak_bytes": peak, "planned_bytes": plan.parts[-1].total, "allowed": allowed}
        result["models"][name] = found
        forwards = {key: round(one["forwards"], 2) for key, one in found["measures"].items()}
        print(
            f"{name}: weights {found['weights_bytes'] / 2**30:.2f} GiB, peak "
            f"{peak / 2**30:.2f} GiB (planned {plan.parts[-1].total / 2**30:.2f}, allowed "
            f"{allowed / 2**30:.2f}), forwards {forwards}",
            flush=True,
        )
        if peak > allowed:
            missed.append(name)
    common.finish(result, "large_models", options)
    if missed:
        sys.exit(f"more memory than allowed: {', '.join(missed)}")


if __name__ == "__main__":
    main()
