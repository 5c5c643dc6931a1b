"""In-context heads exist on every bundled task that the model can do.

One task may be a special case. So the choice is made anew on each of the other tasks that come
with the package, words and sentences of two to six classes: 12 heads by the cost of their
knock-out at the last position, on prompts that share no text with those on which the heads are
then knocked out at all positions, beside as many random heads.

Which tasks the model can do is settled on the choosing prompts, with all seeds together, by an
exact binomial test; the others are told, and count for nothing.

    python experiments/heads_by_task.py --out runs/experiments
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import numpy as np
import xarray as xr

import twotower as tt
from twotower.experiments import parts as common
from twotower.experiments.experiment import SIGNIFICANT, Experiment, Judgement, Setting
from twotower.figures import style
from twotower.results import Variable
from twotower.statistics import bootstrap_mean

RULE = """Of the tasks that the model can do (on the choosing prompts of all seeds together, exact
binomial test, p < 0.05): supported if knocking out the task's own 12 heads costs more accuracy
than knocking out 12 random heads, between the labels and over the vocabulary, (1) over all
prompts of all tasks (interval above 0) and (2) in every task (the mean above 0). Not supported if
an interval of (1) lies wholly below 0, or, between the labels, the interval of some task does;
else undecided, as also where the model can do fewer than three of the tasks."""

CONDITIONS = ("all heads", "in-context heads out", "random heads out")
ALL, OWN, RANDOM = CONDITIONS
ACCURACIES = {"correct": "between the labels", "top1_correct": "over the vocabulary"}


# ---- what is measured ---------------------------------------------------------------------


def measure(setting: Setting) -> Mapping[str, xr.Dataset]:
    """Answers of each task's prompts, with its own heads and random heads knocked out."""
    others = [name for name in tt.prompts.bundled_tasks() if name != setting.task.name]
    tasks = common.some(others, setting.size)
    n = setting.size.n_task // 2
    fitted = np.zeros((len(tasks), n))
    arrays = {name: np.zeros((len(tasks), len(CONDITIONS), n)) for name in common.MEASURES}
    classes, heads, hashes = [], {}, {}
    for row, name in enumerate(tasks):
        task = tt.load_task(name)
        classes.append(len(task.classes))
        fit, test = common.build_task(setting, task, n)
        hashes[name] = [fit.hash, test.hash]
        with setting.stage(f"{name}: sweeping every head"):
            found = tt.analyze(
                setting.model, fit, measures=("predictions", "effects"), logprobs=False
            )
        fitted[row] = found["predictions"]["correct"].values
        heads[name] = tt.in_context_heads(found, setting.size.k)
        random = setting.random_heads(without=heads[name])
        edits = {ALL: [[]], OWN: [heads[name]], RANDOM: random}
        for column, condition in enumerate(CONDITIONS):
            answers = common.knock_out_in_turn(
                setting, test, edits[condition], f"{name}: {condition}"
            )
            for kind, values in answers.items():
                arrays[kind][row, column] = values
    edited = common.answers_of(("task", "condition", "prompt"), "on the testing prompts")
    number = Variable(("task",), "int", "classes", "number of classes, and of labels")
    right = Variable(
        ("task", "prompt"), "float", "right among the labels", "with all heads, choosing prompts"
    )
    answers = setting.table(
        {
            **{name: (edited[name], arrays[name]) for name in arrays},
            "correct_fit": (right, fitted),
            "n_classes": (number, np.array(classes)),
        },
        {"task": tasks, "condition": list(CONDITIONS), "prompt": np.arange(n)},
        sentence_shots=common.SENTENCE_SHOTS,
        prompts_of_tasks=hashes,
    )
    return {"answers": answers, "heads": common.heads_table(setting, heads)}


# ---- the verdict --------------------------------------------------------------------------


def judge(runs: list[xr.DataTree]) -> Judgement:
    """By the rule above."""
    numbers: dict[str, Any] = {}
    able = common.guesses(runs, "answers", "correct_fit")
    tasks = [task for task, p in able.items() if p < SIGNIFICANT]
    for task, p in able.items():
        right = bootstrap_mean(common.pooled(runs, "answers", "correct_fit", task=task))
        numbers[f"{task}: accuracy on the choosing prompts (p = {p:.2g})"] = right
    for task in tasks:
        for kind, words in ACCURACIES.items():
            for condition in CONDITIONS:
                numbers[f"{task}: accuracy {words}, {condition}"] = bootstrap_mean(
                    common.pooled(runs, "answers", kind, task=task, condition=condition)
                )
    by_task = {
        kind: {task: bootstrap_mean(cost(runs, task, kind)) for task in tasks}
        for kind in ACCURACIES
    }
    together = {
        kind: bootstrap_mean(np.concatenate([cost(runs, task, kind) for task in tasks]))
        for kind in ACCURACIES
        if tasks
    }
    for kind, words in ACCURACIES.items():
        for task, estimate in by_task[kind].items():
            numbers[f"{task}: accuracy {words} lost beyond random heads"] = estimate
        if tasks:
            numbers[f"all tasks: accuracy {words} lost beyond random heads"] = together[kind]
    numbers["tasks that the model can do"] = len(tasks)
    numbers["tasks that it cannot"] = ", ".join(t for t in able if t not in tasks) or "none"

    every = all(one.value > 0 for found in by_task.values() for one in found.values())
    verdict = "undecided"
    if len(tasks) >= 3:
        if every and all(one.positive for one in together.values()):
            verdict = "supported"
        elif any(one.negative for one in (*together.values(), *by_task["correct"].values())):
            verdict = "not supported"
    clear = sum(one.positive for one in by_task["correct"].values())
    reason = f"The model can do {len(tasks)} of {len(able)} tasks."
    if tasks:
        least = min(by_task["correct"], key=lambda task: by_task["correct"][task].value)
        reason += (
            f" On them 12 heads cost {together['correct']} of accuracy between the labels beyond "
            f"what random heads cost, {together['top1_correct']} over the vocabulary; the "
            f"interval lies above 0 in {clear} tasks, and the least is {least} "
            f"({by_task['correct'][least]})."
        )
    return Judgement(verdict, reason, numbers)


def cost(runs: list[xr.DataTree], task: str, kind: str) -> np.ndarray:
    """(prompt,) accuracy that the task's own heads cost beyond what random heads cost."""
    left = {
        condition: common.pooled(runs, "answers", kind, task=task, condition=condition)
        for condition in (OWN, RANDOM)
    }
    return left[RANDOM] - left[OWN]


# ---- the picture --------------------------------------------------------------------------


def draw(runs: list[xr.DataTree], judgement: Judgement) -> Any:
    """Accuracy by task: all heads, its own heads knocked out, random heads knocked out."""
    plt = common.pyplot()
    able = common.guesses(runs, "answers", "correct_fit")
    tasks = sorted(able, key=lambda task: (able[task] >= SIGNIFICANT, task))
    n_able = sum(p < SIGNIFICANT for p in able.values())
    figure, axes = plt.subplots(1, 2, figsize=(10, 0.8 + 0.34 * len(tasks)), layout="constrained")
    for place, (kind, words) in zip(axes, ACCURACIES.items(), strict=True):
        for row, task in enumerate(tasks):
            for number, condition in enumerate(CONDITIONS):
                found = bootstrap_mean(
                    common.pooled(runs, "answers", kind, task=task, condition=condition)
                )
                spread = [[found.value - found.low], [found.high - found.value]]
                place.errorbar(
                    found.value,
                    row + 0.22 * (number - 1),
                    xerr=spread,
                    fmt="osD"[number],
                    ms=4,
                    lw=1,
                    color=(style.GREY, style.BLUE, style.ORANGE)[number],
                    label=condition if row == 0 and place is axes[0] else None,
                )
            if kind == "correct":
                chance = 1 / int(runs[0]["answers"]["n_classes"].sel(task=task))
                place.plot([chance, chance], [row - 0.42, row + 0.42], ":", color="black", lw=1)
        if n_able < len(tasks):
            place.axhspan(n_able - 0.5, len(tasks) - 0.5, color="black", alpha=0.06, lw=0)
        place.set(xlabel=f"accuracy {words}", xlim=(-0.03, 1.03), ylim=(len(tasks) - 0.5, -0.5))
    axes[0].set_yticks(range(len(tasks)), tasks)
    axes[1].set_yticks(range(len(tasks)), [])
    if n_able < len(tasks):
        figure.supxlabel("Shaded: tasks that the model was not seen to do.", fontsize=8)
    figure.legend(loc="outside upper center", ncols=3, frameon=False, fontsize=8)
    return figure


EXPERIMENT = Experiment(
    number=13,
    name="in-context-heads-by-task",
    title="In-context heads on every bundled task",
    claim="On every bundled task that the model can do, knocking out 12 heads, chosen on other "
    "prompts of the task, costs more accuracy than knocking out random heads.",
    headline="Five datasets of sentences; knocking out 12 of Llama-7B's 1,024 heads takes accuracy "
    "over the vocabulary from 87.6% to 24.4%.",
    rule=RULE,
    measure=measure,
    judge=judge,
    draw=draw,
)

if __name__ == "__main__":
    from twotower.cli import main

    main(["experiments", "run", __file__, *sys.argv[1:]])
