"""Common parts of the experiments: chosen heads, their scores, and the style of figures."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import xarray as xr

from ..edits.edits import KnockOut
from ..figures.style import LOOK
from ..head import Head
from ..measures.predict import predict
from ..prompts import Prompts, Task
from ..results import Variable
from ..results.missing import finite_prompts
from ..statistics import above_chance, random_bound
from .experiment import FULL, Setting, Size

KINDS = {"writers": "heads that write", "in_context": "in-context heads"}
"""Two choices of heads: by label logit of their own output, and by effect on the margin."""

MEASURES = {
    "margin": ("margin", "right label's logit less the largest of the other labels'"),
    "correct": ("right among the labels", "the right label has the largest logit of all labels"),
    "top1_correct": ("right over the vocabulary", "the most likely token is the right label"),
}
"""Stored variables of the model's answers: name, long name and definition."""


def heads_table(setting: Setting, kinds: Mapping[str, Sequence[Head]]) -> xr.Dataset:
    """Make a table of the chosen heads, (kind, rank, part)."""
    about = Variable(
        ("kind", "rank", "part"),
        "int",
        "chosen heads",
        "layer and head, strongest first, chosen on the fitting prompts",
    )
    size = max(map(len, kinds.values()))
    numbers = np.full((len(kinds), size, 2), -1)
    for row, heads in enumerate(kinds.values()):
        numbers[row, : len(heads)] = heads
    coordinates = {"kind": list(kinds), "rank": np.arange(size), "part": ["layer", "head"]}
    return setting.table({"number": (about, numbers)}, coordinates)


Groups = xr.DataTree | Mapping[str, xr.DataTree]
"""A run, or some of its groups under other names."""


def variable(run: Groups, group: str, name: str) -> xr.DataArray:
    """Return a variable or coordinate of a group."""
    groups = run.children if isinstance(run, xr.DataTree) else run
    return groups[group].dataset[name]


def chosen(run: Groups, kind: str) -> list[Head]:
    """Return the chosen heads of a kind, strongest first."""
    numbers = variable(run, "heads", "number").sel(kind=kind).values
    return [Head(int(layer), int(head)) for layer, head in numbers if layer >= 0]


def mean_score(runs: Sequence[Groups], score: str, kind: str | None) -> float:
    """Return the mean of a score over seeds and the chosen heads (all heads for None)."""
    found = []
    for run in runs:
        values = variable(run, "scores", score).values
        heads = [values[head] for head in chosen(run, kind)] if kind else values
        found.append(np.nanmean(heads))
    return float(np.mean(found))


def mean_random_bound(runs: Sequence[Groups], score: str, kind: str, seed: int = 0) -> float:
    """Return the 95th percentile of a score's mean over random sets of heads; mean over seeds."""
    bounds = [
        random_bound(variable(run, "scores", score).values, len(chosen(run, kind)), seed)
        for run in runs
    ]
    return float(np.mean(bounds))


def pyplot() -> Any:
    """Return matplotlib's pyplot with the style of all figures."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    plt.rcParams.update({**LOOK, "svg.hashsalt": "twotower"})
    return plt


def margin_towards(logits: np.ndarray, label: np.ndarray) -> np.ndarray:
    """Return (prompt,) the logit of a label, given by number, minus the largest other logit."""
    wanted = np.arange(logits.shape[1]) == np.asarray(label)[:, None]
    found: np.ndarray = logits[wanted] - np.where(wanted, -np.inf, logits).max(axis=1)
    return found


def pooled(runs: Sequence[xr.DataTree], group: str, name: str, **at: Any) -> np.ndarray:
    """Return (prompt, ...) a variable of all seeds together, at some coordinates."""
    return np.concatenate([variable(run, group, name).sel(at).values for run in runs])


def chance(runs: Sequence[xr.DataTree]) -> float:
    """Return the accuracy of guessing between the labels."""
    return 1 / len(json.loads(runs[0].attrs["labels"]))


def known(values: Any, *datasets: xr.Dataset | xr.DataTree) -> np.ndarray:
    """Return (prompt, ...) values as floats, NaN where a dataset's prompt is not finite.

    Needed because sums and comparisons turn NaN into numbers.
    """
    found = np.array(values, dtype=float)
    for dataset in datasets:
        found[~finite_prompts(dataset)] = np.nan
    return found


def right(margins: np.ndarray) -> np.ndarray:
    """Return 1 where a margin is above 0, else 0; NaN stays NaN."""
    return np.where(np.isnan(margins), np.nan, margins > 0)


def knock_out_in_turn(
    setting: Setting,
    prompts: Prompts,
    draws: Sequence[Sequence[Head]],
    title: str,
    positions: str = "all",
) -> dict[str, np.ndarray]:
    """Return margin, correct and top1_correct (prompt,) with heads knocked out.

    Prompt i uses draw i modulo the number of draws, so many draws cost no more than one.
    """
    turn = np.arange(len(prompts)) % len(draws)
    found = {name: np.full(len(prompts), np.nan) for name in MEASURES}
    for number, heads in enumerate(draws):
        rows = np.flatnonzero(turn == number)
        with setting.stage(title):
            answers = predict(
                setting.model,
                prompts[rows],
                [KnockOut(heads, positions=positions)] if len(heads) else [],
            )
        for name in MEASURES:
            found[name][rows] = answers[name].values
    return found


def answers_of(dims: tuple[str, ...], what: str) -> dict[str, Variable]:
    """Return the variables for answers, by name."""
    return {
        name: Variable(dims, "float", words, f"{definition}, {what}; NaN where not measured")
        for name, (words, definition) in MEASURES.items()
    }


SENTENCE_SHOTS = 4
"""Demonstrations per label for tasks of sentences, when many tasks are compared."""


def build_task(setting: Setting, task: Task, n: int) -> tuple[Prompts, Prompts]:
    """Build n fitting and n test prompts, with fewer shots for tasks of sentences."""
    shots = setting.size.shots
    if task.kind == "sentences":
        shots = min(shots, SENTENCE_SHOTS)
    halves: tuple[Prompts, Prompts] = setting.build(n, n, task=task, shots=shots)
    return halves


def some(tasks: Sequence[str], size: Size) -> list[str]:
    """Return the names of all tasks, or every few of them for small sizes."""
    return list(tasks[:: max(1, FULL.n_task // size.n_task)])


def guesses(runs: Sequence[xr.DataTree], group: str, name: str) -> dict[str, float]:
    """Return by task the p-value of an exact binomial test that right answers are guesses.

    Uses the answers (task, ..., prompt) of all seeds, and n_classes (task,).
    """
    table = runs[0].children[group].dataset
    found = {}
    for task, n_classes in zip(table["task"].values, table["n_classes"].values, strict=True):
        right = np.concatenate(
            [variable(run, group, name).sel(task=task).values.ravel() for run in runs]
        )
        found[str(task)] = above_chance(right, 1 / int(n_classes))
    return found
