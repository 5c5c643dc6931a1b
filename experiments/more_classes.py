"""More than two classes: the picture where chance is a third, a quarter, a sixth.

The paper has two labels. With more of them a head could still tell one label from the rest,
and the two towers could fail to scale: a retriever must now find the query's class among
several. The same measurements as with two classes, on bundled tasks of 3, 4 and 6 classes:

- heads with the largest effect, and heads that write the answer, knocked out beside random
  ones, between the labels and over the vocabulary;
- QK AUC and OV AUC of the heads that write, beside random sets;
- heads label by label: whose knock-out lowers *that* label's log-probability most where it is
  right. Do labels have heads of their own, or do they share them?

    python experiments/more_classes.py --out runs/experiments
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from itertools import combinations
from typing import Any

import numpy as np
import xarray as xr

import twotower as tt
from twotower.errors import FindingError
from twotower.experiments import parts as common
from twotower.experiments.experiment import Experiment, Judgement, Setting
from twotower.figures import style
from twotower.prompts import load_task
from twotower.results import Variable
from twotower.statistics import bootstrap_mean

TASKS = ("animals-cities-foods", "word-fields", "six-fields")
"""Of 3, 4 and 6 classes, words all of them."""

CONDITIONS = ("nothing", "in-context heads", "heads that write", "random heads")
MEASURES = ("correct", "top1_correct")
K_LABEL = 6
"""Heads per label, as in the paper."""

RULE = """Of tasks with three classes or more that the model can do (exact binomial test on the
fitting prompts, every seed): supported if there is one or more, and in each of them, seeds
together, (1) knocking out the 12 in-context heads costs more accuracy over the vocabulary than
knocking out 12 random ones (interval of the difference by prompt), and (2) the mean QK AUC and
the mean OV AUC of the heads that write exceed those of 95% of random sets. Not supported if in one
of them the interval of (1) lies wholly below 0; else undecided."""


# ---- what is measured ---------------------------------------------------------------------


def measure(setting: Setting) -> Mapping[str, xr.Dataset]:
    """For every task: accuracies, scores, and heads by label."""
    found: dict[str, xr.Dataset] = {}
    for name in TASKS:
        task = load_task(name)
        size = prompts_of(len(task.classes), setting.size.n_test)
        fit, test = setting.build(size, size, task=task)
        try:
            selection = setting.select(fit)
        except FindingError as error:
            print(f"{name}: {error}", file=sys.stderr)
            continue
        found |= {f"{name}-{group}": x for group, x in one_task(setting, selection, test).items()}
    if not found:
        raise FindingError(f"{setting.model.name} does none of {', '.join(TASKS)}")
    return found


def prompts_of(n_classes: int, n: int) -> int:
    """About n prompts, in whole balanced blocks (of classes squared) where n allows one."""
    block = n_classes**2
    return max(n // block * block, block) if n >= block else n


def one_task(setting: Setting, selection: xr.DataTree, test: tt.Prompts) -> dict[str, xr.Dataset]:
    """What is measured on one task."""
    model, k = setting.model, setting.size.k
    heads = tt.in_context_heads(selection, k)
    writers = tt.in_context_heads(selection, k, by="label_logit")
    with setting.stage(f"{test.task_name}: QK and OV"):
        run = tt.analyze(model, test, measures=("predictions", "qk", "ov"))
    answers = [run["predictions"]]
    answers += [
        tt.predict(model, test, [tt.KnockOut(x, positions="all")]) for x in (heads, writers)
    ]
    draws = setting.random_heads(without=heads)
    random = [tt.predict(model, test, [tt.KnockOut(draw, positions="all")]) for draw in draws]
    right = np.stack([[a[m].values for m in MEASURES] for a in answers])
    mean_random = np.mean([[a[m].values for m in MEASURES] for a in random], axis=0)
    accuracy = np.concatenate([right, mean_random[None]]).transpose(2, 0, 1)
    about = Variable(
        ("prompt", "condition", "measure"),
        "float",
        "right answers",
        "1 where right, with heads knocked out at all positions; random heads: mean over draws",
    )
    by_label = {
        label: tt.in_context_heads(selection, K_LABEL, label=label) for label in test.labels
    }
    return {
        "accuracy": setting.table(
            {"right": (about, accuracy)},
            {
                "prompt": np.arange(len(test)),
                "condition": list(CONDITIONS),
                "measure": list(MEASURES),
            },
            test,
        ),
        "scores": run["scores"].to_dataset(),
        "heads": common.heads_table(setting, {"writers": writers, "in_context": heads, **by_label}),
    }


# ---- the verdict --------------------------------------------------------------------------


def judge(runs: list[xr.DataTree]) -> Judgement:
    """By the rule above."""
    numbers: dict[str, Any] = {}
    reasons, holds, fails = [], [], []
    for task in tasks_of(runs):
        right = np.concatenate([run[f"{task}-accuracy"]["right"].values for run in runs])
        labels = label_sets(runs[0], task)
        numbers[f"{task}: chance between the labels"] = 1 / len(labels)
        for row, condition in enumerate(CONDITIONS):
            for column, words in enumerate(("between the labels", "top-1")):
                numbers[f"{task}: accuracy {words}, {condition} knocked out"] = bootstrap_mean(
                    right[:, row, column]
                )
        cost = bootstrap_mean(right[:, 3, 1] - right[:, 1, 1])
        numbers[f"{task}: top-1 accuracy that in-context heads cost beyond random ones"] = cost
        above = []
        for score in ("qk_auc", "ov_auc"):
            mean, bound = towers(runs, task, score)
            words = score.upper().replace("_", " ")
            numbers[f"{task}: {words}, heads that write"] = mean
            numbers[f"{task}: {words}, 95% of random sets below"] = bound
            above.append(mean > bound)
        n_heads = runs[0][f"{task}-scores"]["qk_auc"].size
        numbers[f"{task}: heads that two labels share, of {K_LABEL}"] = float(
            np.mean([shared(label_sets(run, task)) for run in runs])
        )
        numbers[f"{task}: the same by chance"] = K_LABEL**2 / n_heads
        holds.append(cost.positive and all(above))
        fails.append(cost.negative)
        reasons.append(f"{task}: in-context heads cost {cost} more top-1 accuracy than random ones")
    verdict = "undecided"
    if holds and all(holds):
        verdict = "supported"
    elif any(fails):
        verdict = "not supported"
    reasons = reasons or ["the model did none of the tasks in every seed"]
    return Judgement(verdict, "; ".join(reasons) + ".", numbers)


def tasks_of(runs: list[xr.DataTree]) -> list[str]:
    """Tasks that could be done in every seed."""
    return [name for name in TASKS if all(f"{name}-accuracy" in run.children for run in runs)]


def towers(runs: list[xr.DataTree], task: str, score: str) -> tuple[float, float]:
    """A score's mean over the writers, and the 95th percentile over random sets."""
    parts = [{"scores": run[f"{task}-scores"], "heads": run[f"{task}-heads"]} for run in runs]
    return (
        common.mean_score(parts, score, "writers"),
        common.mean_random_bound(parts, score, "writers"),
    )


def label_sets(run: xr.DataTree, task: str) -> list[set[tt.Head]]:
    """Each label's heads."""
    kinds = [str(kind) for kind in run[f"{task}-heads"]["kind"].values]
    part = {"heads": run[f"{task}-heads"]}
    return [set(common.chosen(part, kind)) for kind in kinds if kind not in common.KINDS]


def shared(sets: list[set[tt.Head]]) -> float:
    """Mean number of heads that two labels have in common."""
    return float(np.mean([len(a & b) for a, b in combinations(sets, 2)]))


# ---- the picture --------------------------------------------------------------------------


def draw(runs: list[xr.DataTree], judgement: Judgement) -> Any:
    """Accuracy of every task and condition; the towers of every task."""
    plt = common.pyplot()
    tasks = tasks_of(runs)
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.6), layout="constrained")
    for column, (each, words) in enumerate(
        zip(axes[:2], ("between the labels", "top-1 of the vocabulary"), strict=True)
    ):
        for place, task in enumerate(tasks):
            right = np.concatenate([run[f"{task}-accuracy"]["right"].values for run in runs])
            for row, condition in enumerate(CONDITIONS):
                estimate = bootstrap_mean(right[:, row, column])
                x = place + 0.2 * (row - 1.5)
                style.bar(each, x, estimate, row, condition, place == 0, width=0.19)
            if column == 0:
                chance = judgement.numbers[f"{task}: chance between the labels"]
                each.plot([place - 0.42, place + 0.42], [chance, chance], ":", color="black", lw=1)
        each.set(title=f"Accuracy {words}", ylim=(0, 1.25))
        each.set_xticks(range(len(tasks)), [name.replace("-", "\n") for name in tasks])
        each.set_yticks((0, 0.5, 1))
    axes[0].legend(frameon=False, fontsize=8, ncols=2, title="knocked out")
    for place, task in enumerate(tasks):
        for colour, score in enumerate(("qk_auc", "ov_auc")):
            mean, bound = towers(runs, task, score)
            x = place + 0.3 * (colour - 0.5)
            name = score.upper().replace("_", " ") if place == 0 else None
            axes[2].bar(x, mean, 0.28, color=style.COLOURS[colour], label=name)
            words = "95% of random sets below" if place == 0 and colour == 0 else None
            axes[2].plot([x - 0.14, x + 0.14], [bound, bound], color="black", lw=1.2, label=words)
    axes[2].set_xticks(range(len(tasks)), [name.replace("-", "\n") for name in tasks])
    axes[2].set(title="Towers of the heads that write", ylim=(0, 1.25), yticks=(0, 0.5, 1))
    axes[2].legend(frameon=False, fontsize=8)
    return figure


EXPERIMENT = Experiment(
    number=8,
    name="more-classes",
    title="More than two classes",
    claim="With 3 to 6 classes, too, a few heads carry in-context classification, and those that "
    "write the answer are two towers.",
    headline="Two labels alone; more are called for.",
    rule=RULE,
    measure=measure,
    judge=judge,
    draw=draw,
    task="word-fields",
)

if __name__ == "__main__":
    from twotower.cli import main

    main(["experiments", "run", __file__, *sys.argv[1:]])
