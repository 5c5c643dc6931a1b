"""What other questions cost: answers by prompt, answers of several tokens, function vectors.

Units are plain forwards of the same prompts, in one process. Processor time on one thread is that
of a machine without other work, but for shared caches.

    python benchmarks/questions.py --threads 1 --promote
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import common
import torch

import twotower as tt
from twotower.walk.batch_size import Batches

TOKENS = {1: " foo", 2: " foo bar", 3: " foo bar map"}
"""An answer by its number of tokens."""


def hooked(model: tt.Model, prompts: tt.Prompts, mean: torch.Tensor, head: tt.Head) -> None:
    """A forward in which a hook replaces one head's output at the last position."""
    block = model.architecture.layers(model.module)[head.layer]

    def replace(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> Any:
        z = inputs[0].clone()
        z[:, -1, head.head * model.d_head : (head.head + 1) * model.d_head] = mean
        return (z, *inputs[1:])

    handle = model.architecture.projection(block).register_forward_pre_hook(replace)
    with torch.no_grad():
        for batch in Batches(model, prompts):
            model.module(**batch.inputs)
    handle.remove()


def main() -> None:
    parser = common.arguments(__doc__.splitlines()[0], "questions")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--shots", type=int, default=8)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    tt.set_options(progress=False)
    model = tt.load(options.model)
    task = tt.load_task("animals-cities")
    labelled = tt.build_prompts(model, task, shots=options.shots, n=options.prompts)
    gold = [f" {text}" for text in labelled.gold]
    other = [" bar" if text == " foo" else " foo" for text in gold]
    own = tt.contrast(model, labelled.strings, gold, other)
    by_length = {
        n: tt.contrast(model, labelled.strings, [text] * len(labelled))
        for n, text in TOKENS.items()
    }
    shuffled = labelled.shuffled_labels()
    to = tt.Mean(labelled)
    mean, head = torch.zeros(model.d_head), model.heads[len(model.heads) // 2]

    jobs: dict[str, Callable[[], object]] = {
        "margins of labels": lambda: tt.head_effects(model, labelled, logprobs=False),
        "margins of answers by prompt": lambda: tt.head_effects(model, own, logprobs=False),
        "log-probabilities of labels": lambda: tt.head_effects(model, labelled),
        "log-probabilities of answers by prompt": lambda: tt.head_effects(model, own),
        **{
            f"answers of {n} tokens": (lambda p=p: tt.head_effects(model, p))
            for n, p in by_length.items()
        },
        **{
            f"predictions of {n} tokens": (lambda p=p: tt.predict(model, p))
            for n, p in by_length.items()
        },
        "function-vector effects of all heads": lambda: tt.head_effects(model, shuffled, to=to),
        "one head by a hook": lambda: hooked(model, shuffled, mean, head),
    }
    clock = time.process_time if options.threads == 1 else time.perf_counter
    second, found = common.ratios(
        common.plain_of(model, labelled), jobs, options.rounds, clock=clock
    )
    beyond = {
        n: found[f"answers of {n} tokens"] - found[f"predictions of {n} tokens"] for n in TOKENS
    }
    result = {
        "machine": common.machine(options.threads),
        "model": options.model,
        "prompts": options.prompts,
        "tokens": labelled.n_positions,
        "plain_forward_seconds": round(second, 3),
        "plain_forwards": {name: round(ratio, 3) for name, ratio in found.items()},
        "by_prompt_over_labels": round(
            found["log-probabilities of answers by prompt"] / found["log-probabilities of labels"],
            3,
        ),
        "beyond_the_clean_run_over_one_token": {
            n: round(cost / beyond[1], 2) for n, cost in beyond.items()
        },
        "function_vectors": {
            "heads": len(model.heads),
            "faster_than_one_hooked_forward_for_each": round(
                found["one head by a hook"]
                * len(model.heads)
                / found["function-vector effects of all heads"],
                1,
            ),
        },
    }
    print(result)
    common.finish(result, "questions", options)


if __name__ == "__main__":
    main()
