"""In-context heads exist: a few heads, knocked out, take the task with them.

Heads are chosen on prompts that share no text with those they are tested on, in five ways:

- knock-out: the heads whose knock-out at the last position costs most of the margin;
- knock-out by label: as the paper does, each label's heads by themselves, as many of each: those
  whose knock-out lowers the label's log-probability most where it is right;
- causal tracing: the heads whose output, taken from the prompt and put into its twin with the
  labels reversed, restores most of the prompt's own answer;
- log-probability increase: the heads whose own output raises the right label's log-probability;
- gradient: the heads for which the margin's gradient promises the largest cost of a knock-out.

Then the strongest are knocked out (zero, at all positions, as the paper does), more and more
of them, beside random heads and beside random heads of the same layers. Accuracy between the
labels and accuracy over the vocabulary are both told: the paper's is the second.

    python experiments/in_context_heads.py --out runs/experiments
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
from twotower.experiments.experiment import Experiment, Judgement, Setting
from twotower.figures import style
from twotower.measures.choose import strongest
from twotower.results import Variable
from twotower.statistics import Estimate, bootstrap_mean, mean_known

RULE = """Of the 12 heads chosen by knock-out, knocked out at all positions, all seeds together:
supported if (1) they cost more accuracy than random heads, and than random heads of the same
layers, both between the labels and over the vocabulary (four paired differences, intervals, and
the sign in every seed); and (2) between the labels less than half of what accuracy had above
chance is left (interval, and every seed). Not supported if one of these intervals lies wholly on
the other side; else undecided."""

KNOCK_OUT, RANDOM, MATCHED = "knock-out", "random heads", "random heads, same layers"
CHOICES = (
    KNOCK_OUT,
    "knock-out by label",
    "causal tracing",
    "log-probability increase",
    "gradient",
)
SIZES = (1, 2, 4, 8, 12, 24)
FEW = (4, 12, 24)
"""Numbers of heads: of the knock-out's choice and of random heads, and of the other choices
(of all, where a single draw of random heads shows that no verdict is wanted)."""
HEADLINE = 12
ACCURACIES = {"correct": "between the labels", "top1_correct": "over the vocabulary"}


# ---- what is measured ---------------------------------------------------------------------


def measure(setting: Setting) -> Mapping[str, xr.Dataset]:
    """Heads by every choice, and answers of test prompts with them knocked out."""
    kinds = choose(setting, max(SIZES))
    # Two thirds of the test prompts keep the cost of the many conditions down.
    prompts = setting.test[: 2 * setting.size.n_test // 3]
    choices = [*CHOICES, RANDOM, MATCHED]
    shape = (len(choices), len(SIZES), len(prompts))
    arrays = {name: np.full(shape, np.nan) for name in common.MEASURES}
    n_heads = np.zeros(shape[:2], dtype=int)
    ours = kinds[KNOCK_OUT]
    random = setting.random_heads(max(SIZES), without=ours)
    for row, choice in enumerate(choices):
        for column, k in enumerate(SIZES):
            if k not in FEW and (choice in CHOICES[1:] or setting.size.n_random == 1):
                continue
            if choice == RANDOM:
                draws = [draw[:k] for draw in random]
            elif choice == MATCHED:
                draws = setting.random_heads(like=ours[:k], without=ours)
            else:
                draws = [kinds[choice][:k]]
            title = f"knocking out {k}: {choice}"
            found = common.knock_out_in_turn(setting, prompts, draws, title)
            for name, values in found.items():
                arrays[name][row, column] = values
            n_heads[row, column] = len(draws[0])
    before = common.knock_out_in_turn(setting, prompts, [[]], "as it was")
    dims = ("choice", "size", "prompt")
    edited = common.answers_of(dims, "with the choice's heads knocked out at all positions")
    intact = common.answers_of(("prompt",), "with all heads")
    number = Variable(
        dims[:2], "int", "heads knocked out", "fewer than asked for where a layer has no others"
    )
    answers = setting.table(
        {
            **{name: (edited[name], arrays[name]) for name in arrays},
            **{f"{name}_before": (intact[name], before[name]) for name in arrays},
            "n_heads": (number, n_heads),
        },
        {"choice": choices, "size": list(SIZES), "prompt": np.arange(len(prompts))},
        prompts,
    )
    effects = setting.selection["effects"].to_dataset()[["margin_drop"]]
    heads = common.heads_table(setting, kinds)
    return {"effects": effects, "answers": answers, "heads": heads}


def choose(setting: Setting, k: int) -> dict[str, list[tt.Head]]:
    """The k strongest heads by every choice, strongest first, on the fitting prompts."""
    model, fit, selection = setting.model, setting.fit, setting.selection
    with setting.stage("tracing every head"):
        traced = tt.causal_tracing(model, fit, fit.reversed_labels())
    with setting.stage("taking gradients"):
        gradient = tt.attribution_patching(model, fit)
    increase = selection["attribution"]["logprob_increase"]
    of_right_label = increase.where(increase["label"] == increase["gold"], 0).sum(
        "label", skipna=False
    )
    return {
        KNOCK_OUT: tt.in_context_heads(selection, k),
        "knock-out by label": by_label(selection, k),
        "causal tracing": strongest(traced["margin_gain"].mean("prompt"), k),
        "log-probability increase": strongest(of_right_label.mean("prompt"), k),
        "gradient": tt.in_context_heads(gradient, k),
    }


def by_label(selection: xr.DataTree, k: int) -> list[tt.Head]:
    """k heads, taken in turn from the labels' own rankings; one head counts once."""
    effects = selection["effects"]
    labels = [str(label) for label in effects["label"].values]
    size = effects.sizes["layer"] * effects.sizes["head"]
    rankings = [tt.in_context_heads(effects, size, label=label) for label in labels]
    in_turn = [head for rank in zip(*rankings, strict=True) for head in rank]
    return list(dict.fromkeys(in_turn))[:k]


# ---- the verdict --------------------------------------------------------------------------


def judge(runs: list[xr.DataTree]) -> Judgement:
    """By the rule above."""
    numbers: dict[str, Any] = {}
    for measure, words in ACCURACIES.items():
        numbers[f"accuracy {words}, all heads"] = bootstrap_mean(before(runs, measure))
        for choice in (*CHOICES, RANDOM, MATCHED):
            for k in measured(runs, choice):
                name = f"accuracy {words}, {k} heads knocked out: {choice}"
                numbers[name] = after(runs, choice, k, measure)
    for one, other in combinations(CHOICES, 2):
        numbers[f"of {HEADLINE} heads in common: {one} and {other}"] = overlap(runs, one, other)
    effects = runs[0]["effects"]
    n_all = numbers["heads of the model"] = effects.sizes["layer"] * effects.sizes["head"]
    numbers["heads of a random choice in common, expected"] = HEADLINE**2 / n_all
    of_layers = [run["answers"]["n_heads"].sel(choice=MATCHED, size=HEADLINE) for run in runs]
    numbers[f"{MATCHED}: heads in fact knocked out, of {HEADLINE}"] = float(np.mean(of_layers))

    costs = {}
    for control in (RANDOM, MATCHED):
        for measure, words in ACCURACIES.items():
            costs[f"{words}, beyond {control}"] = [
                _values([run], control, measure) - _values([run], KNOCK_OUT, measure)
                for run in runs
            ]
    half = [
        (before([run], "correct") + common.chance([run])) / 2 - _values([run], KNOCK_OUT, "correct")
        for run in runs
    ]
    costs["between the labels, beyond half of what is above chance"] = half
    estimates = {words: bootstrap_mean(np.concatenate(parts)) for words, parts in costs.items()}
    numbers |= {f"accuracy lost {words}": estimate for words, estimate in estimates.items()}
    same_sign = all(mean_known(part) > 0 for parts in costs.values() for part in parts)
    verdict = "undecided"
    if all(estimate.positive for estimate in estimates.values()) and same_sign:
        verdict = "supported"
    elif any(estimate.negative for estimate in estimates.values()):
        verdict = "not supported"
    told = []
    for measure, words in ACCURACIES.items():
        left, random, matched = (
            after(runs, choice, HEADLINE, measure) for choice in (KNOCK_OUT, RANDOM, MATCHED)
        )
        whole = numbers[f"accuracy {words}, all heads"]
        told.append(
            f"{words} {whole} to {left}, where random heads leave {random} and random heads of "
            f"the same layers {matched}"
        )
    reason = f"{HEADLINE} of {n_all} heads knocked out: accuracy {'; '.join(told)}."
    return Judgement(verdict, reason, numbers)


def measured(runs: list[xr.DataTree], choice: str) -> list[int]:
    """Numbers of heads with which a choice was tested."""
    return [k for k in SIZES if np.isfinite(_values(runs, choice, "correct", k)).any()]


def before(runs: list[xr.DataTree], measure: str) -> np.ndarray:
    """(prompt,) answers with all heads."""
    return common.pooled(runs, "answers", f"{measure}_before")


def _values(runs: list[xr.DataTree], choice: str, measure: str, k: int = HEADLINE) -> np.ndarray:
    return common.pooled(runs, "answers", measure, choice=choice, size=k)


def after(runs: list[xr.DataTree], choice: str, k: int, measure: str) -> Estimate:
    """Accuracy with a choice's heads knocked out."""
    return bootstrap_mean(_values(runs, choice, measure, k))


def overlap(runs: list[xr.DataTree], one: str, other: str, k: int = HEADLINE) -> float:
    """Heads that the first k of two choices have in common; mean over seeds."""
    shared = [
        len({*common.chosen(run, one)[:k]} & {*common.chosen(run, other)[:k]}) for run in runs
    ]
    return float(np.mean(shared))


# ---- the picture --------------------------------------------------------------------------


def draw(runs: list[xr.DataTree], judgement: Judgement) -> Any:
    """Accuracy against the number of heads; what every choice leaves; what choices share."""
    plt = common.pyplot()
    figure, axes = plt.subplots(2, 2, figsize=(9.5, 7), layout="constrained")
    for place, (measure, words) in zip(axes[0], ACCURACIES.items(), strict=True):
        whole = bootstrap_mean(before(runs, measure))
        for colour, choice in enumerate((KNOCK_OUT, RANDOM, MATCHED)):
            sizes = measured(runs, choice)
            curve = [whole, *(after(runs, choice, k, measure) for k in sizes)]
            name = "in-context heads" if choice == KNOCK_OUT else choice
            style.line(place, [0, *(1 + SIZES.index(k) for k in sizes)], curve, colour, name)
        place.set_xticks(range(len(SIZES) + 1), [0, *SIZES])
        place.set(xlabel="heads knocked out, strongest first", ylim=(-0.03, 1.03))
        place.set(ylabel=f"accuracy {words}")
    axes[0, 0].axhline(common.chance(runs), color=style.GREY, lw=0.8, ls=":")
    axes[0, 1].legend(frameon=False, fontsize=8)
    bars, shared = axes[1]
    for x, choice in enumerate(CHOICES):
        for side, (measure, words) in enumerate(ACCURACIES.items()):
            left = after(runs, choice, HEADLINE, measure)
            style.bar(bars, x + 0.36 * side - 0.18, left, side, words, x == 0)
    names = [choice.replace("probability", "prob.").replace(" ", "\n", 1) for choice in CHOICES]
    bars.set_xticks(range(len(CHOICES)), names, fontsize=7)
    bars.set(ylabel=f"accuracy, {HEADLINE} heads knocked out", ylim=(0, 1.03))
    bars.axhline(common.chance(runs), color=style.GREY, lw=0.8, ls=":")
    bars.legend(frameon=False, fontsize=8)
    table = np.array([[overlap(runs, one, other) for other in CHOICES] for one in CHOICES])
    shared.imshow(table, cmap="Blues", vmin=0, vmax=HEADLINE)
    for (row, column), value in np.ndenumerate(table):
        colour = "white" if value > HEADLINE / 2 else "black"
        shared.text(column, row, f"{value:.1f}", ha="center", va="center", color=colour)
    shared.set_xticks(range(len(CHOICES)), names, fontsize=7)
    shared.set_yticks(range(len(CHOICES)), names, fontsize=7)
    shared.set(title=f"heads in common, of {HEADLINE}")
    return figure


EXPERIMENT = Experiment(
    number=1,
    name="in-context-heads",
    title="In-context heads exist",
    claim="Knocking out a few heads, chosen on other prompts, takes away most of what the model "
    "learns in context; as many random heads, also of the same layers, do not.",
    headline="Knocking out 12 of Llama-7B's 1,024 heads takes accuracy over the vocabulary from "
    "87.6% to 24.4%.",
    rule=RULE,
    measure=measure,
    judge=judge,
    draw=draw,
)

if __name__ == "__main__":
    from twotower.cli import main

    main(["experiments", "run", __file__, *sys.argv[1:]])
