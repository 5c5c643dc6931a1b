"""Tasks share their in-context heads, or each has its own.

If a few heads learn in context whatever the task, the heads that matter in one task matter in
another. Every task gets two sets of prompts without a text in common, and every head's effect
(knock-out at the last position, cost of the margin) is measured on both. Two tasks are compared
by the first set of one and the second set of the other, both ways round; a task is compared
with itself in the same way. So the ceiling, what two sets of the *same* task share, comes from
as many prompts as what two tasks share.

The tasks are the default one (words, two classes), words of four classes, sentences of the
default's own classes, and sentences about other things: two languages, travel or meals, and
kinds of quantity. They take few tokens, and the model was seen to do most of them.

Two numbers are compared with chance: how many of the 12 strongest heads are shared (sets drawn
at random: hypergeometric), and the rank correlation of all heads' effects (heads permuted; and,
as a harder test, permuted within their layers, which leaves what is due to depth alone). Last,
each task's 12 heads are knocked out (at all positions) in every task.

    python experiments/shared_heads.py --out runs/experiments
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from itertools import combinations
from typing import Any

import numpy as np
import xarray as xr

import twotower as tt
from twotower.experiments import parts as common
from twotower.experiments.experiment import SIGNIFICANT, Experiment, Judgement, Setting
from twotower.results import Variable
from twotower.statistics import bootstrap_mean, mean_known

RULE = """Of the tasks that the model can do (both sets of prompts, all seeds together, exact
binomial test, p < 0.05), as means over seeds: supported if every two of them share more of their
12 strongest heads than 95% of random sets do, and their effects' rank correlation exceeds 95% of
those with the heads permuted. Not supported if one of the two fails for at least half of the
pairs; else undecided, as also where the model can do fewer than three of the tasks."""

OTHERS = ("word-fields", "animals-cities-sentences", "languages-two", "topic", "prices-ages-times")
HALVES = ("first", "second")
K = 12
NOTHING, RANDOM = "nothing", "random heads"


# ---- what is measured ---------------------------------------------------------------------


def measure(setting: Setting) -> Mapping[str, xr.Dataset]:
    """Effects on two sets of each task's prompts, and each task's heads knocked out in all."""
    model, n = setting.model, setting.size.n_task
    others = [name for name in common.some(OTHERS, setting.size) if name != setting.task.name]
    tasks = [setting.task, *map(tt.load_task, others)]
    names = [task.name for task in tasks]
    drops = np.zeros((len(tasks), 2, n, model.n_layers, model.n_heads))
    correct = np.zeros((len(tasks), 2, n))
    heads, tested, hashes = {}, {}, {}
    for row, task in enumerate(tasks):
        halves = common.build_task(setting, task, n)
        for half, prompts in enumerate(halves):
            with setting.stage(f"{task.name}: sweeping every head"):
                run = tt.analyze(
                    model, prompts, measures=("predictions", "effects"), logprobs=False
                )
            drops[row, half] = run["effects"]["margin_drop"].values
            correct[row, half] = run["predictions"]["correct"].values
            if half == 0:
                heads[task.name] = tt.in_context_heads(run, K)
        # Half of the second set keeps the cost of all tasks' heads in all tasks down.
        tested[task.name] = halves[1][: n // 2]
        hashes[task.name] = [prompts.hash for prompts in halves]
    about = ("task", "half", "prompt")
    effects = setting.table(
        {
            "margin_drop": (
                Variable(
                    (*about, "layer", "head"),
                    "float",
                    "drop of the margin",
                    "clean minus knocked out (zero, last position)",
                ),
                drops,
            ),
            "correct": (common.answers_of(about, "with all heads")["correct"], correct),
            "n_classes": (
                Variable(("task",), "int", "classes", "number of classes, and of labels"),
                np.array([len(task.classes) for task in tasks]),
            ),
        },
        {
            "task": names,
            "half": list(HALVES),
            "prompt": np.arange(n),
            "layer": np.arange(model.n_layers),
            "head": np.arange(model.n_heads),
        },
        sentence_shots=common.SENTENCE_SHOTS,
        prompts_of_tasks=hashes,
    )
    return {
        "effects": effects,
        "answers": answers(setting, tested, heads),
        "heads": common.heads_table(setting, heads),
    }


def answers(
    setting: Setting, tested: Mapping[str, tt.Prompts], heads: Mapping[str, list[tt.Head]]
) -> xr.Dataset:
    """Answers of every task's prompts with every task's heads, and random ones, knocked out."""
    names, conditions = list(tested), [NOTHING, *heads, RANDOM]
    n = len(next(iter(tested.values())))
    arrays = {name: np.zeros((len(names), len(conditions), n)) for name in common.MEASURES}
    for row, (task, prompts) in enumerate(tested.items()):
        random = setting.random_heads(K, without=heads[task])
        draws = {NOTHING: [[]], **{name: [chosen] for name, chosen in heads.items()}}
        draws[RANDOM] = random
        for column, condition in enumerate(conditions):
            found = common.knock_out_in_turn(
                setting, prompts, draws[condition], f"{task}: heads of {condition} knocked out"
            )
            for name, values in found.items():
                arrays[name][row, column] = values
    edited = common.answers_of(("task", "heads_of", "prompt"), "heads knocked out everywhere")
    return setting.table(
        {name: (edited[name], arrays[name]) for name in arrays},
        {"task": names, "heads_of": conditions, "prompt": np.arange(n)},
    )


# ---- the verdict --------------------------------------------------------------------------


def judge(runs: list[xr.DataTree]) -> Judgement:
    """By the rule above."""
    numbers: dict[str, Any] = {}
    p_values = common.guesses(runs, "effects", "correct")
    tasks = [task for task, p in p_values.items() if p < SIGNIFICANT]
    for task, p in p_values.items():
        right = np.concatenate([run["effects"]["correct"].sel(task=task).values for run in runs])
        numbers[f"{task}: accuracy with all heads (p = {p:.2g})"] = bootstrap_mean(right.ravel())
    numbers["tasks that the model can do"] = len(tasks)
    if len(tasks) < 3:
        reason = f"The model can do {len(tasks)} of {len(p_values)} tasks; three are needed."
        return Judgement("undecided", reason, numbers)

    n_all = effects_of(runs[0], tasks).shape[-1]
    overlaps = mean_matrix(runs, tasks, shared)
    correlations = mean_matrix(runs, tasks, rank_correlation)
    bounds = {within: chance_correlation(runs, tasks, within) for within in (False, True)}
    most = overlap_bound(n_all)
    pairs = list(combinations(range(len(tasks)), 2))
    for i, j in pairs:
        name = f"{tasks[i]} and {tasks[j]}"
        numbers[f"{name}: of {K} heads in common"] = float(overlaps[i, j])
        numbers[f"{name}: rank correlation"] = float(correlations[i, j])
    for i, task in enumerate(tasks):
        numbers[f"{task}, two sets: of {K} heads in common"] = float(overlaps[i, i])
        numbers[f"{task}, two sets: rank correlation"] = float(correlations[i, i])
    numbers[f"of {K} heads in common by chance, expected"] = K**2 / n_all
    numbers[f"of {K} heads in common by chance, 95% bound"] = most
    numbers["rank correlation by chance, 95% bound, largest of the pairs"] = float(
        max(bounds[False][pair] for pair in pairs)
    )
    numbers["rank correlation by chance within layers, 95% bound, largest of the pairs"] = float(
        max(bounds[True][pair] for pair in pairs)
    )
    numbers["pairs whose rank correlation exceeds chance within layers"] = sum(
        bool(correlations[pair] > bounds[True][pair]) for pair in pairs
    )
    numbers["pairs of tasks"] = len(pairs)
    numbers |= costs(runs, tasks)

    by_heads = [bool(overlaps[pair] > most) for pair in pairs]
    by_rank = [bool(correlations[pair] > bounds[False][pair]) for pair in pairs]
    verdict = "undecided"
    if all(by_heads) and all(by_rank):
        verdict = "supported"
    elif min(sum(by_heads), sum(by_rank)) <= len(pairs) / 2:
        verdict = "not supported"
    between = [
        float(np.mean([table[pair] for pair in pairs])) for table in (overlaps, correlations)
    ]
    same = [float(np.diag(table).mean()) for table in (overlaps, correlations)]
    reason = (
        f"{len(tasks)} tasks share {between[0]:.1f} of {K} heads on average (two sets of one task "
        f"{same[0]:.1f}, chance {K**2 / n_all:.1f}), beyond chance in {sum(by_heads)} of "
        f"{len(pairs)} pairs; rank correlation {between[1]:.2f} (two sets of one task "
        f"{same[1]:.2f}), beyond chance in {sum(by_rank)}."
    )
    return Judgement(verdict, reason, numbers)


def effects_of(run: xr.DataTree, tasks: list[str]) -> np.ndarray:
    """(task, half, all heads) mean effects."""
    drops = run["effects"]["margin_drop"].sel(task=tasks).mean("prompt")
    return drops.transpose("task", "half", "layer", "head").values.reshape(len(tasks), 2, -1)


Compare = Callable[[np.ndarray, np.ndarray], float]


def shared(one: np.ndarray, other: np.ndarray, k: int = K) -> float:
    """How many of the k strongest heads two effects (all heads,) have in common."""
    strongest = (np.argsort(-effects, kind="stable")[:k] for effects in (one, other))
    return float(len(set.intersection(*map(set, strongest))))


def rank_correlation(one: np.ndarray, other: np.ndarray) -> float:
    """Spearman's, over all heads."""
    from scipy.stats import spearmanr

    return float(spearmanr(one, other).statistic)


def matrix(effects: np.ndarray, compare: Compare) -> np.ndarray:
    """(task, task) the first set of one against the second of the other, both ways round."""
    table = np.array([[compare(one[0], other[1]) for other in effects] for one in effects])
    return (table + table.T) / 2


def mean_matrix(runs: list[xr.DataTree], tasks: list[str], compare: Compare) -> np.ndarray:
    """(task, task) mean over seeds."""
    return np.mean([matrix(effects_of(run, tasks), compare) for run in runs], axis=0)


def overlap_bound(n_all: int, k: int = K) -> int:
    """Number of common heads that 95% of two random sets do not exceed."""
    from scipy.stats import hypergeom

    return int(hypergeom.ppf(0.95, n_all, k, k))


def chance_correlation(
    runs: list[xr.DataTree], tasks: list[str], within: bool, n: int = 400, seed: int = 0
) -> np.ndarray:
    """(task, task) rank correlation that 95% of permutations of the heads do not exceed.

    Mean over seeds, as what it is compared with; `within` permutes heads in their layers.
    """
    from scipy.stats import rankdata

    rng = np.random.default_rng([seed, 31])
    n_layers = runs[0]["effects"].sizes["layer"]
    drawn = np.zeros((n, len(tasks), len(tasks)))
    for run in runs:
        ranks = rankdata(effects_of(run, tasks), axis=-1)
        ranks = (ranks - ranks.mean(-1, keepdims=True)) / ranks.std(-1, keepdims=True)
        layers = np.arange(ranks.shape[-1]).reshape(n_layers, -1)
        for draw in drawn:
            order = rng.permuted(layers, axis=1).ravel() if within else rng.permutation(layers.size)
            table = ranks[:, 0] @ ranks[:, 1][:, order].T / layers.size
            draw += (table + table.T) / 2 / len(runs)
    return np.quantile(drawn, 0.95, axis=0)


def costs(runs: list[xr.DataTree], tasks: list[str]) -> dict[str, Any]:
    """Accuracy lost by a task's own heads, the other tasks', and random ones."""
    lost: dict[str, list[np.ndarray]] = {"own": [], "another task's": [], "random": []}
    for task in tasks:
        others = [other for other in tasks if other != task]
        lost["own"].append(cost(runs, task, task))
        lost["another task's"].append(np.mean([cost(runs, task, x) for x in others], axis=0))
        lost["random"].append(cost(runs, task, RANDOM))
    whole = {name: np.concatenate(parts) for name, parts in lost.items()}
    found = {
        f"accuracy lost with {name} heads knocked out": bootstrap_mean(values)
        for name, values in whole.items()
    }
    beyond = whole["another task's"] - whole["random"]
    found["accuracy lost with another task's heads, beyond random heads"] = bootstrap_mean(beyond)
    return found


def cost(runs: list[xr.DataTree], task: str, heads_of: str) -> np.ndarray:
    """(prompt,) accuracy between the labels that a task loses with some heads knocked out."""
    before = common.pooled(runs, "answers", "correct", task=task, heads_of=NOTHING)
    return before - common.pooled(runs, "answers", "correct", task=task, heads_of=heads_of)


# ---- the picture --------------------------------------------------------------------------


def draw(runs: list[xr.DataTree], judgement: Judgement) -> Any:
    """Common heads, rank correlations, and what every task's heads cost in every task."""
    plt = common.pyplot()
    p_values = common.guesses(runs, "effects", "correct")
    tasks = list(p_values)
    marks = [task if p_values[task] < SIGNIFICANT else f"{task} *" for task in tasks]
    figure, axes = plt.subplots(1, 3, figsize=(13, 4.6), layout="constrained")
    lost = [[mean_known(cost(runs, task, by)) for task in tasks] for by in (*tasks, RANDOM)]
    panels = (
        (mean_matrix(runs, tasks, shared), K, "{:.1f}", f"Heads in common, of {K}"),
        (mean_matrix(runs, tasks, rank_correlation), 1, "{:.2f}", "Rank correlation of effects"),
        (np.array(lost), 0.6, "{:.2f}", "Accuracy lost (columns) by heads of (rows)"),
    )
    for place, (table, top, form, title) in zip(axes, panels, strict=True):
        place.imshow(table, cmap="Blues", vmin=0, vmax=top, aspect="auto")
        for (row, column), value in np.ndenumerate(table):
            colour = "white" if value > 0.6 * top else "black"
            place.text(column, row, form.format(value), ha="center", va="center", color=colour)
        place.set_xticks(range(len(tasks)), marks, rotation=40, ha="right")
        rows = [*marks, RANDOM] if len(table) > len(tasks) else marks
        place.set_yticks(range(len(rows)), rows if place is not axes[1] else [])
        place.set_title(title, fontsize=10)
    below = "Diagonal of the first two: two sets of the same task's prompts."
    if marks != tasks:
        below += " * The model was not seen to do it."
    figure.supxlabel(below, fontsize=8)
    return figure


EXPERIMENT = Experiment(
    number=11,
    name="shared-heads",
    title="Tasks share their in-context heads",
    claim="The heads with the largest effects in one task are, more than by chance, those of "
    "other tasks.",
    headline="Asked as an open question: whether tasks share their in-context heads.",
    rule=RULE,
    measure=measure,
    judge=judge,
    draw=draw,
)

if __name__ == "__main__":
    from twotower.cli import main

    main(["experiments", "run", __file__, *sys.argv[1:]])
