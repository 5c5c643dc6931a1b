"""Some heads work against the answer, and the model answers better without them.

A head works against the answer if its knock-out at the last position raises the margin. Such heads
may write against the right answer themselves (suppressors), or act through later heads
(cancellers). They are found on one half of each question's prompts: labels, word pairs and the
classics. On the other half they are knocked out at the last position, beside random heads of the
same layers, and beside the heads that write most against the answer.

Gains are measured on held-out prompts only: of 270 noisy effects the largest are large by chance,
on the prompts on which they were chosen.

    python experiments/heads_against_the_answer.py --out runs/experiments
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from itertools import combinations
from typing import Any

import numpy as np
import xarray as xr

import twotower as tt
from twotower.experiments import parts as common
from twotower.experiments import questions
from twotower.experiments.experiment import SIGNIFICANT, Experiment, Judgement, Setting
from twotower.experiments.questions import CLASSICS, COMPLETIONS
from twotower.figures import style
from twotower.measures.choose import above_others, strongest
from twotower.measures.head_kinds import KINDS
from twotower.results import Variable
from twotower.statistics import Estimate, bootstrap_mean

RULE = """Of the 12 heads whose knock-out at the last position raises the margin most on the
choosing prompts, knocked out there on the testing prompts of the questions that the model can do
(choosing prompts of all seeds together, exact binomial test, p < 0.05): supported if over all
questions (1) the margin rises, and rises more than with random heads of the same layers knocked
out, (2) so does accuracy between the answers (four paired intervals above 0), and (3) the mean
margin rises in at least three quarters of the questions. Not supported if one of these intervals
lies wholly below 0, or the mean margin rises in less than half of the questions; else undecided, as
also where the model can do fewer than three questions."""

K, FEW = 12, 4
NOTHING = "nothing"
AGAINST = f"{K} heads against the answer"
AGAINST_FEW = f"{FEW} heads against the answer"
EVERYWHERE = f"{AGAINST}, at all positions"
WRITING = f"{K} heads that write against the answer"
RANDOM, RANDOM_FEW = (
    f"{k} random heads, layers of the {k} heads against the answer" for k in (K, FEW)
)
CONDITIONS = (NOTHING, AGAINST, RANDOM, AGAINST_FEW, RANDOM_FEW, WRITING, EVERYWHERE)
SETS = {AGAINST: "against the answer", WRITING: "writing against the answer"}
GAINS = {
    "margin": "margin",
    "correct": "accuracy between the answers",
    "top1_correct": "accuracy over the vocabulary",
}


# ---- what is measured ---------------------------------------------------------------------


def measure(setting: Setting) -> Mapping[str, xr.Dataset]:
    """Effects and written logits of every head, and answers without those against the answer."""
    model, n = setting.model, max(2, setting.size.n_task // 3)
    n_test = max(2, setting.size.n_task // 2)
    known = questions.questions(setting)
    asked = {name: form for name, form in known.items() if form != COMPLETIONS}
    shape = (len(asked), model.n_layers, model.n_heads)
    effects, written, again = np.zeros(shape), np.zeros(shape), np.zeros(shape)
    fitted = np.zeros((len(asked), n))
    arrays = {name: np.zeros((len(asked), len(CONDITIONS), n_test)) for name in common.MEASURES}
    numbers = np.full((len(asked), len(SETS), K, 2), -1)
    n_answers, hashes = [], {}
    for row, (name, form) in enumerate(asked.items()):
        fit, _ = questions.halves(setting, name, n)
        test = questions.halves(setting, name, n_test)[1]
        hashes[name] = [fit.hash, test.hash]
        n_answers.append(len(fit.labels))
        # In the same parts as experiment 14, which has measured them before.
        parts = [fit[: n // 2], fit[n // 2 :]] if form == CLASSICS else [fit]
        runs = [questions.sweep(setting, name, part) for part in parts]
        drops = np.concatenate([run["effects"]["margin_drop"].values for run in runs])
        fitted[row] = np.concatenate([run["predictions"]["correct"].values for run in runs])
        effects[row] = drops.mean(axis=0)
        with setting.stage(f"{name}: what heads write"):
            logits = tt.attribution(model, fit)["label_logit"]
        written[row] = above_others(logits).mean("prompt").transpose("layer", "head").values
        if form == CLASSICS:
            again[row] = np.nan
        else:
            other = questions.sweep(setting, name, questions.halves(setting, name, n)[1])
            again[row] = other["effects"]["margin_drop"].mean("prompt").values
        against, writing = (lowest(values[row]) for values in (effects, written))
        numbers[row] = [against, writing]
        draws = {
            NOTHING: [[]],
            AGAINST: [against],
            RANDOM: setting.random_heads(like=against, without=against),
            AGAINST_FEW: [against[:FEW]],
            RANDOM_FEW: setting.random_heads(like=against[:FEW], without=against),
            WRITING: [writing],
            EVERYWHERE: [against],
        }
        for column, condition in enumerate(CONDITIONS):
            answers = common.knock_out_in_turn(
                setting,
                test,
                draws[condition],
                f"{name}: knocking out {condition}",
                "all" if condition == EVERYWHERE else "last",
            )
            for measured, values in answers.items():
                arrays[measured][row, column] = values
    about = "heads knocked out at the last position"
    measured_with = (arrays, CONDITIONS, fitted, n_answers, hashes, about)
    answers_table = questions.answers_table(setting, asked, *measured_with)
    of_heads = ("task", "layer", "head")
    scores = setting.table(
        {
            "margin_drop": (
                Variable(of_heads, "float", "drop of the margin", "mean, choosing prompts"),
                effects,
            ),
            "margin_drop_again": (
                Variable(
                    of_heads,
                    "float",
                    "drop of the margin on other prompts",
                    "mean over as many held-out prompts; NaN for classics",
                ),
                again,
            ),
            "answer_logit": (
                Variable(
                    of_heads,
                    "float",
                    "logit written for the answer",
                    "label logit of the right answer less the mean of the others', mean over the "
                    "choosing prompts",
                ),
                written,
            ),
        },
        {
            "task": list(asked),
            "layer": np.arange(model.n_layers),
            "head": np.arange(model.n_heads),
        },
    )
    chosen = setting.table(
        {
            "number": (
                Variable(
                    ("task", "set", "rank", "part"),
                    "int",
                    "chosen heads",
                    "layer and head, lowest score first",
                ),
                numbers,
            )
        },
        {
            "task": list(asked),
            "set": list(SETS.values()),
            "rank": np.arange(K),
            "part": ["layer", "head"],
        },
    )
    first, _ = questions.halves(setting, setting.task.name, n)
    return {
        "answers": answers_table,
        "scores": scores,
        "heads": chosen,
        "kinds": questions.kinds(setting, first),
    }


def lowest(values: np.ndarray) -> list[tt.Head]:
    """The K heads with the lowest (layer, head) values, lowest first."""
    layers, heads = map(np.arange, values.shape)
    return strongest(xr.DataArray(-values, {"layer": layers, "head": heads}, ("layer", "head")), K)


# ---- the verdict --------------------------------------------------------------------------


def judge(runs: list[xr.DataTree]) -> Judgement:
    """By the rule above."""
    numbers: dict[str, Any] = {}
    p_values = common.guesses(runs, "answers", "correct_fit")
    tasks = [task for task, p in p_values.items() if p < SIGNIFICANT]
    for task, p in p_values.items():
        right = bootstrap_mean(common.pooled(runs, "answers", "correct_fit", task=task).ravel())
        numbers[f"{task}: accuracy on the choosing prompts (p = {p:.2g})"] = right
    numbers["questions that the model can do"] = len(tasks)
    if len(tasks) < 3:
        reason = f"The model can do {len(tasks)} of {len(p_values)} questions; three are needed."
        return Judgement("undecided", reason, numbers)

    for measured, words in GAINS.items():
        for condition in CONDITIONS[1:]:
            name = f"{words} gained, without {condition}"
            numbers[name] = gain(runs, tasks, condition, measured)
        for one, other in ((AGAINST, RANDOM), (AGAINST_FEW, RANDOM_FEW)):
            name = f"{words} gained, without {one}, beyond random heads"
            numbers[name] = gain(runs, tasks, one, measured, beyond=other)
    by_task = {task: gain(runs, [task], AGAINST, "margin") for task in tasks}
    rising = sum(one.value > 0 for one in by_task.values())
    numbers["questions whose mean margin rises"] = rising
    numbers |= who(runs, tasks)

    decisive = [
        gain(runs, tasks, AGAINST, measured, beyond=other)
        for measured in ("margin", "correct")
        for other in (NOTHING, RANDOM)
    ]
    verdict = "undecided"
    if all(one.positive for one in decisive) and rising >= 0.75 * len(tasks):
        verdict = "supported"
    elif any(one.negative for one in decisive) or rising < len(tasks) / 2:
        verdict = "not supported"
    reason = (
        f"On held-out prompts of {len(tasks)} questions, without the {K} heads the margin changes "
        f"by {decisive[0]} ({decisive[1]} beyond random heads of the same layers) and accuracy "
        f"between the answers by {decisive[2]} ({decisive[3]} beyond random heads); the margin "
        f"rises in {rising} questions."
    )
    tables = {
        "What is gained on held-out prompts": by_question(runs, list(p_values)),
        "Kinds of the heads against the answer": by_kind(runs, tasks),
    }
    return Judgement(verdict, reason, numbers, tables)


def answers(runs: list[xr.DataTree], tasks: list[str], condition: str, measured: str) -> np.ndarray:
    """(prompt,) answers of all tasks and seeds with a condition's heads knocked out."""
    found = [
        common.pooled(runs, "answers", measured, task=task, condition=condition) for task in tasks
    ]
    return np.concatenate(found)


def gain(
    runs: list[xr.DataTree],
    tasks: list[str],
    condition: str,
    measured: str,
    beyond: str = NOTHING,
) -> Estimate:
    """Mean difference between two conditions, paired by prompt."""
    after, before = (answers(runs, tasks, one, measured) for one in (condition, beyond))
    return bootstrap_mean(after - before)


def heads_of(run: xr.DataTree, task: str, words: str) -> list[tt.Head]:
    """Heads of a set, lowest score first."""
    numbers = run["heads"]["number"].sel(task=task, set=words).values
    return [tt.Head(int(layer), int(head)) for layer, head in numbers]


def who(runs: list[xr.DataTree], tasks: list[str]) -> dict[str, Any]:
    """Who the heads against the answer are, and whether they are so on other prompts."""
    found: dict[str, list[float]] = {}
    counts: dict[tt.Head, int] = {}
    for run in runs:
        sets = {task: heads_of(run, task, SETS[AGAINST]) for task in tasks}
        for task, heads in sets.items():
            scores = run["scores"].to_dataset().sel(task=task)
            again = np.array([scores["margin_drop_again"].values[head] for head in heads])
            if np.isfinite(again).all():
                name = f"of {K} heads against the answer, against it on other prompts"
                found.setdefault(name, []).append(float((again < 0).sum()))
            written = np.array([scores["answer_logit"].values[head] for head in heads])
            name = f"of {K} heads against the answer, write against it"
            found.setdefault(name, []).append(float((written < 0).sum()))
            both = {*heads} & {*heads_of(run, task, SETS[WRITING])}
            name = f"of {K} heads against the answer, among the {K} that write most against it"
            found.setdefault(name, []).append(float(len(both)))
            for head in heads:
                counts[head] = counts.get(head, 0) + 1
        for one, other in combinations(tasks, 2):
            name = f"of {K} heads against the answer, in common for two questions"
            found.setdefault(name, []).append(float(len({*sets[one]} & {*sets[other]})))
    numbers: dict[str, Any] = {words: float(np.mean(values)) for words, values in found.items()}
    n_all = runs[0]["scores"].sizes["layer"] * runs[0]["scores"].sizes["head"]
    numbers[f"of {K} heads in common by chance, expected"] = K**2 / n_all
    often = sorted(counts, key=lambda head: (-counts[head], head))[:K]
    total, kinds = len(runs) * len(tasks), questions.kinds_of(runs)
    numbers["heads against the answer in most questions and seeds"] = "; ".join(
        f"{head} ({counts[head]} of {total}; {', '.join(kinds[head]) or 'no kind'})"
        for head in often
    )
    return numbers


def by_kind(runs: list[xr.DataTree], tasks: list[str]) -> dict[str, Any]:
    """Table: share of each kind among all heads and among the heads of each set."""
    kinds = questions.kinds_of(runs)
    sets = {"all heads": list(kinds)}
    for words in SETS.values():
        sets[f"heads {words}"] = [
            head for run in runs for task in tasks for head in heads_of(run, task, words)
        ]
    rows = [
        [kind, *(float(np.mean([kind in kinds[head] for head in own])) for own in sets.values())]
        for kind in KINDS
    ]
    return {"columns": ["share of", *sets], "rows": rows}


def by_question(runs: list[xr.DataTree], tasks: list[str]) -> dict[str, Any]:
    """Table: margin and accuracy of every question with and without heads."""
    n_classes = runs[0]["answers"]["n_classes"]
    columns = ["question", "margin gained", "beyond random heads", "accuracy between the answers"]
    columns += ["without them", "without random heads", "chance", "heads most against the answer"]
    rows = []
    for task in tasks:
        accuracies = [
            bootstrap_mean(answers(runs, [task], condition, "correct"))
            for condition in (NOTHING, AGAINST, RANDOM)
        ]
        mean = np.mean([run["scores"]["margin_drop"].sel(task=task).values for run in runs], axis=0)
        heads = [f"{head} ({mean[head]:+.2f})" for head in lowest(mean)[:FEW]]
        rows.append(
            [
                task,
                gain(runs, [task], AGAINST, "margin"),
                gain(runs, [task], AGAINST, "margin", beyond=RANDOM),
                *accuracies,
                1 / int(n_classes.sel(task=task)),
                ", ".join(heads),
            ]
        )
    return {"columns": columns, "rows": rows}


# ---- the picture --------------------------------------------------------------------------


def draw(runs: list[xr.DataTree], judgement: Judgement) -> Any:
    """Margin and accuracy gained by question, and what single heads do and write."""
    plt = common.pyplot()
    tasks = list(common.guesses(runs, "answers", "correct_fit"))
    figure, axes = plt.subplots(1, 3, figsize=(13, 4.4), layout="constrained")
    for place, measured in zip(axes, ("margin", "correct"), strict=False):
        for x, task in enumerate(tasks):
            for side, (condition, words) in enumerate(
                ((AGAINST, AGAINST), (RANDOM, "random heads, same layers"))
            ):
                value = gain(runs, [task], condition, measured)
                style.bar(place, x + 0.36 * side - 0.18, value, side, words, x == 0)
        place.axhline(0, color="black", lw=0.8)
        place.set_xticks(range(len(tasks)), tasks, rotation=50, ha="right", fontsize=8)
        place.set(ylabel=f"{GAINS[measured]} gained", title="held-out prompts")
    axes[0].legend(frameon=False, fontsize=8)
    effects, written = (
        np.mean([run["scores"][name].values for run in runs], axis=(0, 1)).ravel()
        for name in ("margin_drop", "answer_logit")
    )
    axes[2].scatter(written, effects, s=12, color=style.COLOURS[0], lw=0)
    axes[2].axhline(0, color="black", lw=0.8)
    axes[2].axvline(0, color="black", lw=0.8)
    shape = runs[0]["scores"]["margin_drop"].shape[1:]
    values = effects.reshape(shape)
    for head in lowest(values)[:FEW]:
        at = (written.reshape(shape)[head], values[head])
        axes[2].annotate(str(head), at, fontsize=8, xytext=(3, -8), textcoords="offset points")
    axes[2].set(
        xlabel="logit written for the answer, mean over questions",
        ylabel="drop of the margin when knocked out",
    )
    return figure


EXPERIMENT = Experiment(
    number=16,
    name="heads-against-the-answer",
    title="Heads that work against the answer",
    claim="Some heads work against the right answer: found on one half of the prompts and knocked "
    "out at the last position, they leave more margin and accuracy on the other half.",
    headline="Knocks out heads that help; heads that harm are not among its claims.",
    rule=RULE,
    measure=measure,
    judge=judge,
    draw=draw,
    prompts="8 prompts of every question to choose on and 12 to test on",
)

if __name__ == "__main__":
    from twotower.cli import main

    main(["experiments", "run", __file__, *sys.argv[1:]])
