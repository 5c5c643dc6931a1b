"""Labels, word pairs and completions share their heads, or each form of question has its own.

Experiment 11 compares tasks of one form. Here the forms differ:

- classification: arbitrary labels of words and of sentences ("lion: foo");
- pairs: a word for a word ("hot: cold"), which the model must know beforehand;
- completions: the answer follows a middle word ("lion: animal, foo"), a short chain of thought.
  A head is knocked out wherever a token of the completion is predicted;
- classics, for comparison: indirect object, greater-than and agreement, without demonstrations.

Every question gets two sets of prompts without a text in common (classics: different prompts),
and every head's effect on the margin is measured on both. Two questions are compared by the first
set of one and the second set of the other, both ways round. Between the sets of one question the
same numbers show how much noise there is.

Numbers are compared with chance: the heads of one form are permuted within their layers, in all of
its questions and seeds alike. So what is due to depth alone does not count as sharing. Last, the
strongest heads of each form are named by their kinds (`twotower.head_kinds`).

    python experiments/one_set_of_heads.py --out runs/experiments
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np
import xarray as xr

import twotower as tt
from twotower.experiments import parts as common
from twotower.experiments import questions
from twotower.experiments.experiment import SIGNIFICANT, Experiment, Judgement, Setting
from twotower.experiments.questions import (
    CLASS_CHAIN,
    CLASSICS,
    CLASSIFICATION,
    COMPLETIONS,
    COUNTRY_CHAIN,
    LETTER_CHAIN,
    PAIRS,
)
from twotower.measures.head_kinds import KINDS
from twotower.results import Variable
from twotower.statistics import above_chance, bootstrap_mean, mean_known

RULE = """Of the questions that the model can do (both sets of prompts, all seeds together, exact
binomial test, p < 0.05), for each two of the three forms, averaged over seeds and over all pairs of
a question of one form and a question of the other: two forms share heads if (1) their questions
have more of their 12 strongest heads in common, and (2) the rank correlation of their effects is
larger, than in 95% of random permutations of the heads within their layers. Supported if each two
forms share heads; not supported if some two forms fail in both numbers; else undecided, as also
where the model can do fewer than two questions of a form."""

FORMS = (CLASSIFICATION, PAIRS, COMPLETIONS)
K = 12
OVERLAP, CORRELATION = "heads in common", "rank correlation"
SCORES = tuple(dict.fromkeys(score for score, _ in KINDS.values()))
"""Scores of kinds of heads, whose rank correlation with the effects is reported."""
SAME_WORDS = (
    ("animals-cities", CLASS_CHAIN),
    ("opposites", LETTER_CHAIN),
    ("first-letters", LETTER_CHAIN),
    ("nationalities", COUNTRY_CHAIN),
)
"""Questions of different forms about the same words; numbers without these pairs are added."""


# ---- what is measured ---------------------------------------------------------------------


def measure(setting: Setting) -> Mapping[str, xr.Dataset]:
    """Effects on two sets of each question's prompts, and the kinds of heads."""
    model, n = setting.model, max(2, setting.size.n_task // 3)
    asked = questions.questions(setting)
    shape = (len(asked), 2, n)
    drops = np.full((*shape, model.n_layers, model.n_heads), np.nan)
    answers = {name: np.full(shape, np.nan) for name in common.MEASURES}
    n_answers, hashes = [], {}
    for row, (name, form) in enumerate(asked.items()):
        halves = questions.halves(setting, name, n)
        if form == CLASSICS:  # half as many, since years have two tokens and cost more
            halves = (halves[0][: n // 2], halves[0][n // 2 :])
        for half, prompts in enumerate(halves):
            run = questions.sweep(setting, name, prompts)
            drops[row, half, : len(prompts)] = run["effects"]["margin_drop"].values
            for kind, values in answers.items():
                values[row, half, : len(prompts)] = run["predictions"][kind].values
        n_answers.append(len(prompts.labels))
        hashes[name] = [prompts.hash for prompts in halves]
    about = ("task", "half", "prompt")
    variables = common.answers_of(about, "with all heads")
    dropped = Variable(
        (*about, "layer", "head"), "float", "drop of the margin", "clean minus knocked out (zero)"
    )
    effects = setting.table(
        {
            "margin_drop": (dropped, drops),
            **{kind: (variables[kind], values) for kind, values in answers.items()},
            "n_classes": (
                Variable(("task",), "int", "answers", "number of answers compared"),
                np.array(n_answers),
            ),
            "form": (
                Variable(("task",), "str", "form", "form of the question"),
                np.array(list(asked.values()), dtype=object),
            ),
        },
        {
            "task": list(asked),
            "half": ["first", "second"],
            "prompt": np.arange(n),
            "layer": np.arange(model.n_layers),
            "head": np.arange(model.n_heads),
        },
        prompts_of_tasks=hashes,
    )
    fit, _ = questions.halves(setting, setting.task.name, n)
    return {"effects": effects, "kinds": questions.kinds(setting, fit)}


# ---- the verdict --------------------------------------------------------------------------


def judge(runs: list[xr.DataTree]) -> Judgement:
    """By the rule above."""
    numbers: dict[str, Any] = {}
    done = able(runs)
    rows = {form: [task for task, own in done.items() if own == form] for form in FORMS}
    for form, tasks in rows.items():
        numbers[f"{form}: questions that the model can do"] = len(tasks)
    tables = {"Every question": every_question(runs)}
    if min(map(len, rows.values())) < 2:
        few = ", ".join(f"{len(tasks)} of {form}" for form, tasks in rows.items())
        reason = f"The model can do {few}; two of each are needed."
        return Judgement("undecided", reason, numbers, tables)

    vectors = {kind: features(runs, list(done), kind) for kind in (OVERLAP, CORRELATION)}
    n_layers = runs[0]["effects"].sizes["layer"]
    found = {kind: between(values, done) for kind, values in vectors.items()}
    chances = {kind: chance(values, done, n_layers) for kind, values in vectors.items()}
    beyond: dict[tuple[str, str], list[bool]] = {}
    for pair in combinations(FORMS, 2):
        for kind, values in found.items():
            expected, bound = chances[kind][pair]
            name = f"{' and '.join(pair)}: {kind}"
            numbers[name] = values[pair]
            numbers[f"{name}, by chance within layers"] = expected
            numbers[f"{name}, 95% bound of chance"] = bound
            beyond.setdefault(pair, []).append(values[pair] > bound)
            if COMPLETIONS in pair:
                other = between(vectors[kind], done, leave=SAME_WORDS)[pair]
                numbers[f"{name}, without questions about the same words"] = other
    for form in FORMS:
        for kind, values in found.items():
            numbers[f"{form}, two questions: {kind}"] = values[form, form]
            numbers[f"{form}, two sets of one question: {kind}"] = values[form, "itself"]
            if (form, CLASSICS) in values:
                numbers[f"{form} and {CLASSICS}: {kind}"] = values[form, CLASSICS]
                numbers[f"{form} and {CLASSICS}: {kind}, 95% bound of chance"] = chances[kind][
                    form, CLASSICS
                ][1]
    strong = {form: strongest(runs, tasks) for form, tasks in rows.items()}
    together, tables["Strongest heads of the forms and their kinds"] = by_kind(runs, strong)
    numbers |= together | score_correlations(runs, rows)

    verdict = "undecided"
    if all(all(both) for both in beyond.values()):
        verdict = "supported"
    elif any(not any(both) for both in beyond.values()):
        verdict = "not supported"
    told = [
        f"{' and '.join(pair)} {found[OVERLAP][pair]:.1f} of {K} heads (bound of chance "
        f"{chances[OVERLAP][pair][1]:.1f}) with rank correlation {found[CORRELATION][pair]:.2f} "
        f"({chances[CORRELATION][pair][1]:.2f})"
        for pair in beyond
    ]
    itself = np.mean([found[OVERLAP][form, "itself"] for form in FORMS])
    reason = (
        f"Questions of different forms share: {'; '.join(told)}. Two sets of one question share "
        f"{itself:.1f}. {numbers['heads among the 12 strongest of all three forms']} heads are "
        "among the 12 strongest of all three forms."
    )
    return Judgement(verdict, reason, numbers, tables)


def forms_of(runs: list[xr.DataTree]) -> dict[str, str]:
    """Form of every question."""
    table = runs[0]["effects"]
    return dict(zip(table["task"].values.tolist(), table["form"].values.tolist(), strict=True))


def able(runs: list[xr.DataTree]) -> dict[str, str]:
    """Form of every question that the model can do."""
    p_values = common.guesses(runs, "effects", "correct")
    return {task: form for task, form in forms_of(runs).items() if p_values[task] < SIGNIFICANT}


def every_question(runs: list[xr.DataTree]) -> dict[str, Any]:
    """Table of accuracy against chance and the strongest heads of every question."""
    rows = []
    for task, form in forms_of(runs).items():
        right, top = (
            np.concatenate([run["effects"][kind].sel(task=task).values.ravel() for run in runs])
            for kind in ("correct", "top1_correct")
        )
        guessed = 1 / int(runs[0]["effects"]["n_classes"].sel(task=task))
        p = above_chance(right, guessed)
        effects = mean_effects(runs, [task])[0]
        heads = [
            f"{name(runs, i)} ({effects[i]:+.2f})" for i in np.argsort(-effects, kind="stable")[:5]
        ]
        rows.append(
            [
                task,
                form,
                bootstrap_mean(right),
                f"{guessed:.2f} (p = {p:.1g})",
                bootstrap_mean(top),
                ", ".join(heads),
            ]
        )
    columns = ["question", "form", "accuracy between the answers", "chance"]
    columns += ["accuracy over the vocabulary", "strongest heads (effect on the margin)"]
    return {"columns": columns, "rows": rows}


def name(runs: list[xr.DataTree], number: int) -> str:
    """A head's name, layer.head, by its number among all heads."""
    return str(tt.Head(*map(int, np.divmod(number, runs[0]["effects"].sizes["head"]))))


def effects_of(run: xr.DataTree, tasks: list[str]) -> np.ndarray:
    """(task, half, all heads) mean effects."""
    drops = run["effects"]["margin_drop"].sel(task=tasks).mean("prompt", skipna=True)
    return drops.transpose("task", "half", "layer", "head").values.reshape(len(tasks), 2, -1)


def mean_effects(runs: list[xr.DataTree], tasks: list[str]) -> np.ndarray:
    """(task, all heads) mean effects over both sets and all seeds."""
    found: np.ndarray = np.mean([effects_of(run, tasks) for run in runs], axis=(0, 2))
    return found


def features(runs: list[xr.DataTree], tasks: list[str], kind: str) -> np.ndarray:
    """(run, task, half, all heads) vectors whose dot products are the compared numbers.

    Of sets of heads these are ones for the strongest heads; of rank correlations, ranks of mean 0
    and length 1.
    """
    from scipy.stats import rankdata

    effects = np.stack([effects_of(run, tasks) for run in runs])
    ranks = rankdata(effects, axis=-1)
    if kind == OVERLAP:
        order = np.argsort(-effects, axis=-1, kind="stable")
        found = np.zeros_like(ranks)
        np.put_along_axis(found, order[..., :K], 1, axis=-1)
        return found
    ranks -= ranks.mean(axis=-1, keepdims=True)
    found = ranks / np.linalg.norm(ranks, axis=-1, keepdims=True)
    return found


def of_questions(vectors: np.ndarray) -> np.ndarray:
    """(task, task) numbers: first set of one and second of the other, both ways; mean over runs."""
    table = np.einsum("rih,rjh->ij", vectors[:, :, 0], vectors[:, :, 1]) / len(vectors)
    both: np.ndarray = (table + table.T) / 2
    return both


def between(
    vectors: np.ndarray, forms: Mapping[str, str], leave: Sequence[tuple[str, str]] = ()
) -> dict[tuple[str, str], float]:
    """Mean number for each two forms; (form, form) two questions, (form, "itself") one.

    Pairs of questions in `leave` are left out.
    """
    table, places = of_questions(vectors), list(forms)
    for one, other in leave:
        if one in forms and other in forms:
            i, j = places.index(one), places.index(other)
            table[i, j] = table[j, i] = np.nan
    own = np.array(list(forms.values()))
    found = {}
    for one in dict.fromkeys(forms.values()):
        for other in dict.fromkeys(forms.values()):
            block = table[np.ix_(own == one, own == other)]
            if one != other:
                found[one, other] = float(mean_known(block.ravel()))
            else:
                found[one, "itself"] = float(np.diag(block).mean())
                apart = block[~np.eye(len(block), dtype=bool)]
                found[one, one] = float(apart.mean()) if apart.size else float("nan")
    return found


def chance(
    vectors: np.ndarray, forms: Mapping[str, str], n_layers: int, n: int = 1000, seed: int = 0
) -> dict[tuple[str, str], tuple[float, float]]:
    """Mean and 95% bound of the numbers with one form's heads permuted within layers.

    One permutation holds for all questions of the form and all runs, as one model has them all.
    """
    rng = np.random.default_rng([seed, 41])
    own = np.array(list(forms.values()))
    means = {form: vectors[:, own == form].mean(axis=1) for form in dict.fromkeys(own)}
    layers = np.arange(vectors.shape[-1]).reshape(n_layers, -1)
    found = {}
    for one, other in combinations(means, 2):
        drawn = []
        for _ in range(n):
            order = rng.permuted(layers, axis=1).ravel()
            parts = [
                (means[one][:, half] * means[other][:, 1 - half][:, order]).sum(axis=-1)
                for half in range(2)
            ]
            drawn.append(np.mean(parts))
        found[one, other] = (float(np.mean(drawn)), float(np.quantile(drawn, 0.95)))
    return found


# ---- the heads of the forms -----------------------------------------------------------------


def strongest(runs: list[xr.DataTree], tasks: list[str]) -> list[int]:
    """Numbers of the heads with the largest effects in a form, each question counting alike."""
    effects = mean_effects(runs, tasks)
    alike = (effects / effects.std(axis=1, keepdims=True)).mean(axis=0)
    return [int(i) for i in np.argsort(-alike, kind="stable")[:K]]


def by_kind(
    runs: list[xr.DataTree], strong: Mapping[str, list[int]]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Heads by the number of forms to which they belong: numbers, and a table of their kinds."""
    kinds = list(questions.kinds_of(runs).values())
    count = np.zeros(len(kinds), dtype=int)
    for heads in strong.values():
        count[heads] += 1
    groups = {
        "of the model": np.arange(len(kinds)),
        "strongest of all three forms": np.flatnonzero(count == 3),
        "of two forms": np.flatnonzero(count == 2),
        **{
            f"of {form} only": np.array([i for i in heads if count[i] == 1], dtype=int)
            for form, heads in strong.items()
        },
    }
    rows: list[list[Any]] = [["heads", *(len(heads) for heads in groups.values())]]
    for kind in KINDS:
        rows.append([kind, *(sum(kind in kinds[i] for i in own) for own in groups.values())])
    rows.append(["of no kind", *(sum(not kinds[i] for i in own) for own in groups.values())])
    described = {
        i: f"{name(runs, i)} ({', '.join(kinds[i]) or 'no kind'})" for i in range(len(kinds))
    }
    numbers: dict[str, Any] = {
        "heads among the 12 strongest of all three forms": int((count == 3).sum()),
        "heads among the 12 strongest of all three forms, expected by chance": K**3
        / len(kinds) ** 2,
    }
    for words, heads in list(groups.items())[1:]:
        numbers[f"heads {words}"] = "; ".join(described[int(i)] for i in heads) or "none"
    return numbers, {"columns": ["kind", *groups], "rows": rows}


def score_correlations(runs: list[xr.DataTree], rows: Mapping[str, list[str]]) -> dict[str, float]:
    """Rank correlation of every kind's score with a form's effects, over all heads."""
    from scipy.stats import spearmanr

    found = {}
    for score in SCORES:
        values = np.mean([run["kinds"][score].values for run in runs], axis=0).ravel()
        for form, tasks in rows.items():
            effects = mean_effects(runs, tasks)
            alike = (effects / effects.std(axis=1, keepdims=True)).mean(axis=0)
            words = f"{form}: rank correlation of effects with the score {score}"
            found[words] = float(spearmanr(values, alike).statistic)
    return found


# ---- the picture --------------------------------------------------------------------------


def draw(runs: list[xr.DataTree], judgement: Judgement) -> Any:
    """Heads in common and rank correlations of all questions, with lines between the forms."""
    plt = common.pyplot()
    forms, done = forms_of(runs), able(runs)
    tasks = list(forms)
    marks = [task if task in done else f"{task} *" for task in tasks]
    edges = [i for i in range(1, len(tasks)) if forms[tasks[i]] != forms[tasks[i - 1]]]
    figure, axes = plt.subplots(1, 2, figsize=(13, 6.4), layout="constrained")
    for place, (kind, top, form) in zip(
        axes, ((OVERLAP, K, "{:.0f}"), (CORRELATION, 1, "{:.1f}")), strict=True
    ):
        vectors = features(runs, tasks, kind)
        table = of_questions(vectors)
        place.imshow(table, cmap="Blues", vmin=0, vmax=top, aspect="auto")
        for (row, column), value in np.ndenumerate(table):
            colour = "white" if value > 0.6 * top else "black"
            text = form.format(value)
            place.text(column, row, text, ha="center", va="center", color=colour, fontsize=8)
        for edge in edges:
            place.axhline(edge - 0.5, color="black", lw=1)
            place.axvline(edge - 0.5, color="black", lw=1)
        place.set_xticks(range(len(tasks)), marks, rotation=50, ha="right", fontsize=8)
        place.set_yticks(range(len(tasks)), marks if place is axes[0] else [], fontsize=8)
        of = f", of {K}" if kind == OVERLAP else " of effects"
        place.set_title(f"{kind}{of}".capitalize(), fontsize=10)
    parted = ", ".join(dict.fromkeys(forms.values()))
    below = f"Lines part {parted}. Diagonal: two sets of one question."
    if marks != tasks:
        below += " * The model was not seen to do it."
    figure.supxlabel(below, fontsize=8)
    return figure


EXPERIMENT = Experiment(
    number=14,
    name="one-set-of-heads",
    title="Labels, pairs and completions share their heads",
    claim="Classification, word pairs and completions with a middle word depend on the same heads, "
    "more than by chance and depth.",
    headline="Asked as an open question: whether classification, generation and reasoning share "
    "their heads.",
    rule=RULE,
    measure=measure,
    judge=judge,
    draw=draw,
    prompts="two sets of 8 prompts of every question (classics: of 4)",
)

if __name__ == "__main__":
    from twotower.cli import main

    main(["experiments", "run", __file__, *sys.argv[1:]])
