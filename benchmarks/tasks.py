"""How well a model does each bundled task: the table in twotower/prompts/tasks/README.md.

python benchmarks/tasks.py --write
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

import twotower as tt
from twotower.statistics import bootstrap_mean

README = Path(__file__).parents[1] / "twotower" / "prompts" / "tasks" / "README.md"

HEADER = """# Bundled tasks

Every text was written for twotower. `twotower tasks` lists the tasks, `twotower tasks NAME`
shows some texts, `twotower.load_task(NAME)` loads one.

The table says how well {model} does each task, with its default labels (foo, bar, map, key,
cup, dog) and template, {shots} demonstrations per label and {n} prompts (seed {seed}): the
right label has the largest logit of the labels (between the labels), or is the most likely
token of the vocabulary (top-1), with 95% bootstrap intervals. Tasks marked hard are near
chance for a model of this size; they are here for larger ones. Made by
`benchmarks/tasks.py --write`.

| task | kind | classes | texts a class | tokens | chance | between the labels | top-1 | |
|---|---|---|---|---|---|---|---|---|
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--shots", type=int, default=8)
    parser.add_argument("--n", type=int, default=48)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tasks", nargs="+", default=tt.prompts.bundled_tasks())
    parser.add_argument("--write", action="store_true", help="write the README of the tasks")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model = tt.load(options.model)
    rows = []
    for name in options.tasks:
        task = tt.load_task(name)
        prompts = tt.build_prompts(model, task, shots=options.shots, n=options.n, seed=options.seed)
        answers = tt.predict(model, prompts)
        found = [bootstrap_mean(answers[x].values) for x in ("correct", "top1_correct")]
        rows.append(
            f"| {name} | {task.kind} | {', '.join(task.classes)} "
            f"| {min(map(len, task.texts.values()))} | {prompts.n_positions} "
            f"| {1 / len(task.classes):.2f} | {found[0]} | {found[1]} "
            f"| {'hard' if task.hard else ''} |"
        )
        print(rows[-1], flush=True)
    if options.write:
        about = vars(options) | {"model": options.model}
        README.write_text(HEADER.format(**about) + "\n".join(rows) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
