"""In-context heads beside induction heads and function-vector heads.

Three kinds of heads are said to carry in-context learning:

- in-context heads: their knock-out at the last position costs most of the margin (Yu & Ananiadou
  2024);
- induction heads: in random sequences that are repeated, they look at the token after a token's
  first occurrence (Olsson et al. 2022, arXiv:2209.11895);
- function-vector heads: their mean output restores the right answer in prompts whose labels are
  shuffled (Todd et al. 2024, arXiv:2310.15213).

Sets of heads overlap, so knocking out one kind removes some of another. As in Yin & Steinhardt
(2025, arXiv:2502.14010), each kind is therefore also knocked out without the others: the strongest
heads of the kind that are not among the strongest of another kind, as many of each. Beside them
stand random heads of the same layers. In-context and function-vector heads are chosen for each
question, on prompts that share no text with those on which heads are knocked out (zero, at all
positions); induction heads need no task. In-context heads are chosen by the very effect that is
measured, though on other prompts, and the other kinds are not.

    python experiments/three_kinds_of_heads.py --out runs/experiments
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
from twotower.experiments.questions import CLASSIFICATION, PAIRS
from twotower.figures import style
from twotower.measures.choose import strongest
from twotower.results import Variable
from twotower.statistics import Estimate, bootstrap_mean

RULE = """On classification and on pairs alike, of the questions that the model can do (choosing
prompts of all seeds together, exact binomial test, p < 0.05): supported if (1) fewer than half of
the 12 in-context heads are among the 12 induction heads or the 12 function-vector heads (mean over
questions and seeds), and (2) the 12 strongest in-context heads of no other kind cost more accuracy
between the answers than the 12 strongest induction heads of no other kind, than the 12 strongest
function-vector heads of no other kind, and than random heads of their own layers (three paired
intervals above 0). Not supported if, in one of the two forms, (1) fails or an interval of (2) lies
wholly below 0; else undecided, as also where the model can do no question of a form."""

IN_CONTEXT, INDUCTION, FUNCTION = KINDS = ("in-context", "induction", "function vector")
K = 12
FORMS = (CLASSIFICATION, PAIRS)
N_QUESTIONS = {CLASSIFICATION: 2, PAIRS: 3}
"""Questions of each form; fewer than in experiment 14, as there are many conditions."""
NOTHING = "nothing"
ACCURACIES = {"correct": "between the answers", "top1_correct": "over the vocabulary"}


def alone(kind: str) -> str:
    """Name of the condition with a kind's heads that are of no other kind."""
    return f"{kind} heads of no other kind"


def whole(kind: str) -> str:
    """Name of the condition with all of a kind's heads."""
    return f"{kind} heads"


def control(kind: str) -> str:
    """Name of the condition with random heads of the layers of `alone`."""
    return f"random heads, layers of the {alone(kind)}"


CONDITIONS = (NOTHING, *(name(kind) for name in (whole, alone, control) for kind in KINDS))


# ---- what is measured ---------------------------------------------------------------------


def measure(setting: Setting) -> Mapping[str, xr.Dataset]:
    """Scores of the three kinds, and answers with each kind's heads knocked out."""
    model, n = setting.model, max(2, setting.size.n_task // 3)
    n_test = max(2, setting.size.n_task // 2)
    known = questions.questions(setting)
    asked = {
        name: form
        for form in FORMS
        for name in [name for name in known if known[name] == form][: N_QUESTIONS[form]]
    }
    scores = np.zeros((len(asked), len(KINDS), model.n_layers, model.n_heads))
    fitted = np.zeros((len(asked), n))
    arrays = {name: np.zeros((len(asked), len(CONDITIONS), n_test)) for name in common.MEASURES}
    numbers = np.full((len(asked), 2 * len(KINDS), K, 2), -1)
    n_answers, hashes = [], {}
    for row, name in enumerate(asked):
        fit, _ = questions.halves(setting, name, n)
        test = questions.halves(setting, name, n_test)[1]
        hashes[name] = [fit.hash, test.hash]
        n_answers.append(len(fit.labels))
        found, fitted[row] = kind_scores(setting, name, fit)
        scores[row] = list(found.values())
        chosen = choose(found)
        for place, heads in enumerate(chosen.values()):
            numbers[row, place, : len(heads)] = heads
        named = sorted({head for heads in chosen.values() for head in heads})
        draws = {NOTHING: [[]], **{words: [heads] for words, heads in chosen.items()}}
        for kind in KINDS:
            like = chosen[alone(kind)]
            draws[control(kind)] = setting.random_heads(like=like, without=named)
        for column, condition in enumerate(CONDITIONS):
            answers = common.knock_out_in_turn(
                setting, test, draws[condition], f"{name}: knocking out {condition}"
            )
            for measured, values in answers.items():
                arrays[measured][row, column] = values
    about = "heads knocked out everywhere"
    measured_with = (arrays, CONDITIONS, fitted, n_answers, hashes, about)
    answers_table = questions.answers_table(setting, asked, *measured_with)
    dims = ("task", "kind", "layer", "head")
    about = "drop of the margin, induction score, gain of the right answer's log-probability"
    scores_table = setting.table(
        {"score": (Variable(dims, "float", "score of the kind", about), scores)},
        {
            "task": list(asked),
            "kind": list(KINDS),
            "layer": np.arange(model.n_layers),
            "head": np.arange(model.n_heads),
        },
    )
    heads_table = setting.table(
        {
            "number": (
                Variable(
                    ("task", "set", "rank", "part"),
                    "int",
                    "chosen heads",
                    "layer and head, strongest first; -1 where there are fewer",
                ),
                numbers,
            )
        },
        {
            "task": list(asked),
            "set": [name(kind) for name in (whole, alone) for kind in KINDS],
            "rank": np.arange(K),
            "part": ["layer", "head"],
        },
    )
    return {"answers": answers_table, "scores": scores_table, "heads": heads_table}


def kind_scores(
    setting: Setting, name: str, fit: tt.Prompts
) -> tuple[dict[str, xr.DataArray], np.ndarray]:
    """(layer, head) score of each kind on the choosing prompts, and which of these are right."""
    run = questions.sweep(setting, name, fit)
    first, _ = questions.halves(setting, setting.task.name, len(fit))
    with setting.stage(f"{name}: function-vector effects"):
        shuffled = fit.shuffled_labels(setting.seed)
        changed = tt.head_effects(setting.model, shuffled, to=tt.Mean(fit))["logprob_drop"]
    right = changed["label"] == changed["gold"]
    scores = {
        IN_CONTEXT: run["effects"]["margin_drop"].mean("prompt"),
        INDUCTION: questions.kinds(setting, first)["induction"],
        FUNCTION: -changed.where(right, 0).sum("label").mean("prompt"),
    }
    return scores, run["predictions"]["correct"].values


def choose(scores: Mapping[str, xr.DataArray]) -> dict[str, list[tt.Head]]:
    """The K strongest heads of each kind, and of each kind without the others' K strongest."""
    sets = {kind: strongest(values, K) for kind, values in scores.items()}
    found = {whole(kind): heads for kind, heads in sets.items()}
    for kind, values in scores.items():
        others = {head for other in KINDS if other != kind for head in sets[other]}
        ranked = strongest(values, values.size)
        found[alone(kind)] = [head for head in ranked if head not in others][:K]
    return found


# ---- the verdict --------------------------------------------------------------------------


def judge(runs: list[xr.DataTree]) -> Judgement:
    """By the rule above."""
    numbers: dict[str, Any] = {}
    p_values = common.guesses(runs, "answers", "correct_fit")
    table = runs[0]["answers"]
    forms = dict(zip(table["task"].values.tolist(), table["form"].values.tolist(), strict=True))
    tasks = {
        form: [task for task, own in forms.items() if own == form and p_values[task] < SIGNIFICANT]
        for form in FORMS
    }
    for task, p in p_values.items():
        right = bootstrap_mean(common.pooled(runs, "answers", "correct_fit", task=task).ravel())
        numbers[f"{task}: accuracy on the choosing prompts (p = {p:.2g})"] = right
    if not all(tasks.values()):
        few = ", ".join(f"{len(own)} questions of {form}" for form, own in tasks.items())
        return Judgement("undecided", f"The model can do {few}; one of each is needed.", numbers)

    n_all = runs[0]["scores"].sizes["layer"] * runs[0]["scores"].sizes["head"]
    rows, fails, holds, told = [], [], [], []
    for form, own in tasks.items():
        for one, other in combinations(KINDS, 2):
            numbers[f"{form}: of {K} heads in common, {one} and {other}"] = overlap(
                runs, own, one, other
            )
            numbers[f"{form}: rank correlation, {one} and {other}"] = correlation(
                runs, own, one, other
            )
        elsewhere = numbers[f"{form}: of {K} in-context heads, of another kind"] = shared(runs, own)
        for kind in KINDS:
            numbers[f"{form}: mean layer, {whole(kind)}"] = mean_layer(runs, own, kind)
        for measured, words in ACCURACIES.items():
            for kind in KINDS:
                lost = difference(runs, own, control(kind), alone(kind), measured)
                name = f"{form}: accuracy {words} lost by {alone(kind)}, beyond random heads"
                numbers[f"{name} of the same layers"] = lost
            for kind in (INDUCTION, FUNCTION):
                lost = difference(runs, own, alone(kind), alone(IN_CONTEXT), measured)
                name = f"{form}: accuracy {words} lost by {alone(IN_CONTEXT)}, beyond {alone(kind)}"
                numbers[name] = lost
            lost = difference(runs, own, alone(INDUCTION), alone(FUNCTION), measured)
            name = f"{form}: accuracy {words} lost by {alone(FUNCTION)}, beyond {alone(INDUCTION)}"
            numbers[name] = lost
        decisive = [
            difference(runs, own, condition, alone(IN_CONTEXT), "correct")
            for condition in (alone(INDUCTION), alone(FUNCTION), control(IN_CONTEXT))
        ]
        holds.append(elsewhere < K / 2 and all(one.positive for one in decisive))
        fails.append(elsewhere >= K / 2 or any(one.negative for one in decisive))
        told.append(
            f"{form}: {elsewhere:.1f} of {K} in-context heads are of another kind; accuracy "
            f"{left(runs, own, NOTHING, 'correct')}, without heads of no other kind "
            + ", ".join(f"{kind} {left(runs, own, alone(kind), 'correct')}" for kind in KINDS)
        )
    for condition in CONDITIONS:
        rows.append(
            [
                condition,
                *(
                    left(runs, own, condition, measured)
                    for own in tasks.values()
                    for measured in ACCURACIES
                ),
            ]
        )
    columns = ["heads knocked out"]
    columns += [f"{form}: accuracy {words}" for form in tasks for words in ACCURACIES.values()]
    numbers[f"of {K} heads in common by chance, expected"] = K**2 / n_all
    verdict = "supported" if all(holds) else "not supported" if any(fails) else "undecided"
    tables = {"Accuracy with heads knocked out": {"columns": columns, "rows": rows}}
    return Judgement(verdict, f"{'; '.join(told)}.".capitalize(), numbers, tables)


def answers(runs: list[xr.DataTree], tasks: list[str], condition: str, measured: str) -> np.ndarray:
    """(prompt,) answers of all tasks and seeds with a condition's heads knocked out."""
    return np.concatenate(
        [common.pooled(runs, "answers", measured, task=task, condition=condition) for task in tasks]
    )


def left(runs: list[xr.DataTree], tasks: list[str], condition: str, measured: str) -> Estimate:
    """Accuracy with a condition's heads knocked out."""
    return bootstrap_mean(answers(runs, tasks, condition, measured))


def difference(
    runs: list[xr.DataTree], tasks: list[str], one: str, other: str, measured: str
) -> Estimate:
    """Accuracy that one condition leaves less what the other leaves, paired by prompt."""
    first, second = (answers(runs, tasks, condition, measured) for condition in (one, other))
    return bootstrap_mean(first - second)


def heads_of(run: xr.DataTree, task: str, words: str) -> list[tuple[int, int]]:
    """Heads of a set, strongest first."""
    numbers = run["heads"]["number"].sel(task=task, set=words).values
    return [(int(layer), int(head)) for layer, head in numbers if layer >= 0]


def overlap(runs: list[xr.DataTree], tasks: list[str], one: str, other: str) -> float:
    """Heads that two kinds have in common; mean over questions and seeds."""
    found = [
        len({*heads_of(run, task, whole(one))} & {*heads_of(run, task, whole(other))})
        for run in runs
        for task in tasks
    ]
    return float(np.mean(found))


def shared(runs: list[xr.DataTree], tasks: list[str]) -> float:
    """In-context heads that are of another kind, too; mean over questions and seeds."""
    found = []
    for run in runs:
        for task in tasks:
            sets = [{*heads_of(run, task, whole(kind))} for kind in KINDS]
            found.append(len(sets[0] & (sets[1] | sets[2])))
    return float(np.mean(found))


def mean_layer(runs: list[xr.DataTree], tasks: list[str], kind: str) -> float:
    """Mean layer of a kind's heads, from 0."""
    layers = [
        layer for run in runs for task in tasks for layer, _ in heads_of(run, task, whole(kind))
    ]
    return float(np.mean(layers))


def correlation(runs: list[xr.DataTree], tasks: list[str], one: str, other: str) -> float:
    """Rank correlation of two kinds' scores over all heads; mean over questions and seeds."""
    from scipy.stats import spearmanr

    found = []
    for run in runs:
        for task in tasks:
            scores = run["scores"]["score"].sel(task=task)
            pair = (scores.sel(kind=kind).values.ravel() for kind in (one, other))
            found.append(spearmanr(*pair).statistic)
    return float(np.mean(found))


# ---- the picture --------------------------------------------------------------------------


def draw(runs: list[xr.DataTree], judgement: Judgement) -> Any:
    """Accuracy without each kind's heads, whole and alone, beside random heads."""
    plt = common.pyplot()
    table = runs[0]["answers"]
    forms = np.array(table["form"].values.tolist())
    figure, axes = plt.subplots(2, 2, figsize=(10, 7), layout="constrained", sharey=True)
    for row, form in zip(axes, FORMS, strict=True):
        tasks = table["task"].values[forms == form].tolist()
        for place, (measured, words) in zip(row, ACCURACIES.items(), strict=True):
            before = left(runs, tasks, NOTHING, measured)
            place.axhline(before.value, color=style.GREY, lw=0.8, ls=":", label="all heads")
            for x, kind in enumerate(KINDS):
                for side, (condition, text) in enumerate(
                    (
                        (whole(kind), f"{K} strongest of the kind"),
                        (alone(kind), f"{K} strongest of no other kind"),
                        (control(kind), "random heads of the same layers"),
                    )
                ):
                    value = left(runs, tasks, condition, measured)
                    style.bar(place, x + 0.27 * (side - 1), value, side, text, x == 0, width=0.25)
            place.set_xticks(range(len(KINDS)), KINDS)
            place.set(ylim=(0, 1.03), title=form, ylabel=f"accuracy {words}")
    axes[0, 0].legend(frameon=False, fontsize=8)
    return figure


EXPERIMENT = Experiment(
    number=15,
    name="three-kinds-of-heads",
    title="In-context, induction and function-vector heads",
    claim="In-context heads are a set of their own: most are neither induction heads nor "
    "function-vector heads, and without those that are, they cost more accuracy than either of the "
    "other kinds by itself.",
    headline="Finds in-context heads by their effect; which of them are induction heads or "
    "function-vector heads is not among its claims.",
    rule=RULE,
    measure=measure,
    judge=judge,
    draw=draw,
    prompts="8 prompts of every question to choose on and 12 to test on",
)

if __name__ == "__main__":
    from twotower.cli import main

    main(["experiments", "run", __file__, *sys.argv[1:]])
