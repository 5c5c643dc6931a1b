"""Other architectures: the same code on models of four kinds that were trained to do the task.

The paper's models are decoders of two or three makes. Is what is found in them a matter of one
architecture? Here small models of GPT-2's, GPT-J's, GPT-NeoX's and Llama's kind (grouped-query)
are trained from scratch, by `small_models.py`, on made-up words in classes with labels that are
drawn anew in every sequence, until they classify. In each the same is measured as in the large
model: are there heads that carry it, and are they two towers?

Each seed trains models of its own, which takes minutes; they are kept and found again. A pretrained
model of any of these architectures is measured by the other experiments with `--model`.

    python experiments/other_architectures.py --out runs/experiments
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

import twotower as tt
from twotower.experiments import parts as common
from twotower.experiments import small_models
from twotower.experiments.experiment import QUICK, Experiment, Judgement, Setting
from twotower.figures import style
from twotower.results import Variable
from twotower.statistics import above_chance, bootstrap_mean

K = 2
"""Heads that are chosen, of 16."""

SHOTS = 4
CONDITIONS = ("nothing", "in-context heads", "random heads")

RULE = """Supported if in every architecture, seeds together, (1) the model does the task (exact
binomial test on the test prompts), (2) knocking out its 2 in-context heads costs more accuracy
than knocking out 2 random ones (interval of the difference by prompt), and (3) the mean QK AUC
and the mean OV AUC of the 2 heads that write exceed those of 95% of all pairs of heads, as means
over seeds. Not supported if in one that does the task the interval of (2) lies wholly below 0;
else undecided."""


# ---- what is measured ---------------------------------------------------------------------


def measure(setting: Setting) -> Mapping[str, xr.Dataset]:
    """Accuracies, scores and heads of every architecture's model."""
    quick = setting.size.name == QUICK.name
    found: dict[str, xr.Dataset] = {}
    for architecture in small_models.ARCHITECTURES[-1:] if quick else small_models.ARCHITECTURES:
        recipe = json.dumps(small_models.recipe(small_models.SETTINGS)).encode()
        name = f"{architecture}-{setting.seed}-{hashlib.sha256(recipe).hexdigest()[:8]}"
        folder = setting.folder.parent / "small-models" / name
        training = trained(architecture, setting.seed, folder)
        model = tt.load(str(folder))
        own = replace(setting, model=model, task=made_up_task(setting.seed))
        own.size = replace(setting.size, k=K, shots=SHOTS)
        parts = one_model(own, training)
        found |= {f"{architecture}-{group}": dataset for group, dataset in parts.items()}
    return found


def trained(architecture: str, seed: int, folder: Path) -> dict[str, Any]:
    """What the training wrote; it is done where it was not."""
    about = folder / "training.json"
    if not about.exists():
        folder.mkdir(parents=True, exist_ok=True)
        small_models.train(architecture, seed, folder, small_models.SETTINGS)
    found: dict[str, Any] = json.loads(about.read_text())
    return found


def made_up_task(seed: int) -> tt.Task:
    """Two of the classes."""
    pairs = list(combinations(small_models.words().items(), 2))
    chosen = dict(pairs[7 * seed % len(pairs)])
    return tt.Task("made-up-" + "-".join(chosen), chosen)


def one_model(setting: Setting, training: dict[str, Any]) -> dict[str, xr.Dataset]:
    """What is measured in one model."""
    model, test = setting.model, setting.test
    run = tt.analyze(model, test, measures=("predictions", "qk", "ov"))
    heads, writers = setting.heads, setting.writers
    conditions = [[], [tt.KnockOut(heads, positions="all")]]
    answers = [tt.predict(model, test, edits)["correct"].values for edits in conditions]
    random = [
        tt.predict(model, test, tt.KnockOut(draw, positions="all"))["correct"].values
        for draw in setting.random_heads()
    ]
    right = np.stack([*answers, np.mean(random, axis=0)], axis=-1).astype(float)
    about = Variable(
        ("prompt", "condition"),
        "float",
        "right between the labels",
        "with heads knocked out at all positions; random heads: mean over draws",
    )
    coordinates = {"prompt": np.arange(len(test)), "condition": list(CONDITIONS)}
    accuracy = setting.table({"right": (about, right)}, coordinates, **training)
    return {
        "accuracy": accuracy,
        "scores": run["scores"].to_dataset(),
        "heads": common.heads_table(setting, {"writers": writers, "in_context": heads}),
    }


# ---- the verdict --------------------------------------------------------------------------


def judge(runs: list[xr.DataTree]) -> Judgement:
    """By the rule above."""
    numbers: dict[str, Any] = {}
    holds, fails, reasons = [], [], []
    for name in architectures(runs):
        right = np.concatenate([run[f"{name}-accuracy"]["right"].values for run in runs])
        for column, condition in enumerate(CONDITIONS):
            numbers[f"{name}: accuracy, {condition} knocked out"] = bootstrap_mean(right[:, column])
        cost = bootstrap_mean(right[:, 2] - right[:, 1])
        numbers[f"{name}: accuracy that in-context heads cost beyond random ones"] = cost
        does = above_chance(right[:, 0], 0.5) < 0.05
        above = []
        for score in ("qk_auc", "ov_auc"):
            mean, bound = towers(runs, name, score)
            words = score.upper().replace("_", " ")
            numbers[f"{name}: {words}, heads that write"] = mean
            numbers[f"{name}: {words}, 95% of pairs of heads below"] = bound
            above.append(mean > bound)
        holds.append(does and cost.positive and all(above))
        fails.append(does and cost.negative)
        reasons.append(f"{name} {numbers[f'{name}: accuracy, nothing knocked out']}, cost {cost}")
    verdict = "undecided"
    if all(holds):
        verdict = "supported"
    elif any(fails):
        verdict = "not supported"
    carried = "Accuracy, and what 2 in-context heads cost beyond random ones: "
    reason = f"{carried}{'; '.join(reasons)}. {towers_in_words(numbers, architectures(runs))}"
    return Judgement(verdict, reason, numbers)


def towers_in_words(numbers: Mapping[str, Any], names: Sequence[str]) -> str:
    """QK and OV AUC of the heads that write, each with its bound."""
    parts = []
    for name in names:
        found = [
            f"{numbers[f'{name}: {score}, heads that write']:.2f} "
            f"({numbers[f'{name}: {score}, 95% of pairs of heads below']:.2f})"
            for score in ("QK AUC", "OV AUC")
        ]
        parts.append(f"{name} {', '.join(found)}")
    words = "QK AUC and OV AUC of the heads that write, each with the bound that it must exceed: "
    return f"{words}{'; '.join(parts)}."


def architectures(runs: list[xr.DataTree]) -> list[str]:
    """Those that were measured."""
    return [x for x in small_models.ARCHITECTURES if f"{x}-accuracy" in runs[0].children]


def towers(runs: list[xr.DataTree], name: str, score: str) -> tuple[float, float]:
    """A score's mean over the writers, and the 95th percentile over all sets of as many heads."""
    means, bounds = [], []
    for run in runs:
        part = {"scores": run[f"{name}-scores"], "heads": run[f"{name}-heads"]}
        means.append(common.mean_score([part], score, "writers"))
        values = part["scores"][score].values.ravel()
        sets = np.array(list(combinations(range(values.size), K)))
        bounds.append(np.quantile(values[sets].mean(axis=1), 0.95))
    return float(np.mean(means)), float(np.mean(bounds))


# ---- the picture --------------------------------------------------------------------------


def draw(runs: list[xr.DataTree], judgement: Judgement) -> Any:
    """Accuracy of every architecture; the two towers of every head."""
    plt = common.pyplot()
    names = architectures(runs)
    figure, axes = plt.subplots(
        1, 1 + len(names), figsize=(3.4 + 2 * len(names), 3.2), layout="constrained", squeeze=False
    )
    left, *rest = axes[0]
    for place, name in enumerate(names):
        for column, condition in enumerate(CONDITIONS):
            estimate = judgement.numbers[f"{name}: accuracy, {condition} knocked out"]
            x = place + 0.27 * (column - 1)
            style.bar(left, x, estimate, column, condition, place == 0, width=0.25)
    left.axhline(0.5, color=style.GREY, lw=0.8, ls=":")
    left.set_xticks(range(len(names)), names)
    left.set(ylim=(0, 1.45), yticks=(0, 0.5, 1), title="Accuracy between the labels")
    left.legend(frameon=False, fontsize=8, title="knocked out")
    for panel, name in zip(rest, names, strict=True):
        for number, run in enumerate(runs):
            scores = run[f"{name}-scores"]
            qk, ov = scores["qk_auc"].values, scores["ov_auc"].values
            panel.scatter(qk, ov, s=14, color=style.COLOURS[number], label=f"seed {number}")
            chosen = common.chosen({"heads": run[f"{name}-heads"]}, "writers")
            x, y = np.array([(qk[head], ov[head]) for head in chosen]).T
            panel.scatter(x, y, s=60, marker="s", fc="none", ec="black")
        panel.set(xlabel="QK AUC", title=name, xlim=(-0.03, 1.03), ylim=(-0.03, 1.03))
        for line in (panel.axhline, panel.axvline):
            line(0.5, color=style.GREY, lw=0.8, ls=":")
    rest[0].set_ylabel("OV AUC (squares: write)")
    rest[-1].legend(frameon=False, fontsize=7)
    return figure


EXPERIMENT = Experiment(
    number=9,
    name="other-architectures",
    title="Other architectures",
    claim="In GPT-2, GPT-J, GPT-NeoX and Llama alike a few heads carry in-context classification, "
    "and those that write the answer are two towers.",
    headline="GPT2-large, GPT-J and Llama; further architectures are called for.",
    rule=RULE,
    subject="models of 4 layers of 4 heads and 64 features, one of each architecture and seed, "
    "trained by small_models.py (float32); made-up words of two classes, 4 demonstrations a label",
    measure=measure,
    judge=judge,
    draw=draw,
)

if __name__ == "__main__":
    from twotower.cli import main

    main(["experiments", "run", __file__, *sys.argv[1:]])
