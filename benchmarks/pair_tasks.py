"""How well a model does each task of pairs and each classic: twotower/prompts/pairs/README.md.

python benchmarks/pair_tasks.py --write
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

import twotower as tt
from twotower.prompts.classics import CLASSICS
from twotower.statistics import bootstrap_mean

README = Path(__file__).parents[1] / "twotower" / "prompts" / "pairs" / "README.md"

HEADER = """# Bundled tasks of pairs

Every pair was written for twotower. `twotower.prompts.bundled_pairs()` lists the tasks,
`twotower.load_pairs(NAME)` loads one.

The table says how well {model} does each task with the default template, on {n} prompts with
{shots} demonstrations and on the same queries without any (0 shots), seed {seed}. "Right against
wrong": the right answer is more likely than one wrong answer, another pair's output; chance is
0.50. "Top-1": each token of the right answer is the most likely of the vocabulary. Brackets hold
95% bootstrap intervals. A task is marked as at chance if the first interval includes 0.50.
Made by `benchmarks/pair_tasks.py --write`.

| task | pairs | example | right against wrong | top-1 | right against wrong, 0 shots | \
top-1, 0 shots | |
|---|---|---|---|---|---|---|---|
"""

CLASSIC_HEADER = """
## Classics

`twotower.prompts.classic_prompts(model, NAME)` makes prompts of three well-known tasks. The same
measures on {classic_n} prompts (seed {seed}). Top-1 counts only the one right answer of a prompt,
although other years or verbs may follow. "Corrupted": how often the right answer is still more
likely than the wrong one in the prompts' corrupted partners. There indirect-object holds neither
name, in greater-than both years are later than the start year, and in agreement the wrong answer
is the right one.

| name | example | right against wrong | top-1 | corrupted |
|---|---|---|---|---|
"""


def cells(found: dict[str, object]) -> str:
    """Return the two accuracies of a set of predictions as cells of a table."""
    return " | ".join(str(found[name]) for name in ("correct", "top1_correct"))


def accuracies(model: tt.Model, prompts: tt.Prompts) -> dict[str, object]:
    """Return accuracies with their intervals: between the answers, and of the vocabulary."""
    answers = tt.predict(model, prompts)
    return {name: bootstrap_mean(answers[name].values) for name in ("correct", "top1_correct")}


def at_chance(found: dict[str, object]) -> str:
    return "at chance" if found["correct"].low <= 0.5 else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--shots", type=int, default=8)
    parser.add_argument("--n", type=int, default=40)
    parser.add_argument("--classic-n", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tasks", nargs="*", default=tt.prompts.bundled_pairs())
    parser.add_argument("--classics", nargs="*", default=list(CLASSICS))
    parser.add_argument("--write", action="store_true", help="write the README of the tasks")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model = tt.load(options.model)
    rows, classic_rows = [], []
    for name in options.tasks:
        task = tt.load_pairs(name)
        some, none = (
            accuracies(
                model, tt.build_prompts(model, task, shots=k, n=options.n, seed=options.seed)
            )
            for k in (options.shots, 0)
        )
        given, output = task.pairs[0]
        rows.append(
            f"| {name} | {len(task.pairs)} | {given}: {output} | {cells(some)} | {cells(none)} "
            f"| {at_chance(some)} |"
        )
        print(rows[-1], flush=True)
    for name in options.classics:
        clean, corrupted = (
            tt.prompts.classic_prompts(
                model, name, n=options.classic_n, seed=options.seed, corrupted=corrupted
            )
            for corrupted in (False, True)
        )
        right, wrong = clean.answers.text[0]
        found, partner = (accuracies(model, prompts) for prompts in (clean, corrupted))
        classic_rows.append(
            f"| {name} | {clean.strings[0]} (right: {right.strip()}, wrong: {wrong.strip()}) "
            f"| {cells(found)} | {partner['correct']} |"
        )
        print(classic_rows[-1], flush=True)
    if options.write:
        page = HEADER.format(**vars(options)) + "\n".join(rows) + "\n"
        page += CLASSIC_HEADER.format(**vars(options)) + "\n".join(classic_rows) + "\n"
        README.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
