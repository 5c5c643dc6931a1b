"""What experiments share: chosen heads in a run, scores of them, and the look of figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import xarray as xr

import twotower as tt
from twotower.results import Variable
from twotower.runs.experiment import Setting
from twotower.runs.statistics import Estimate

KINDS = {"writers": "heads that write", "in_context": "in-context heads"}
"""Two choices of heads: by label logit of their own output, and by effect on the margin."""

BLUE, ORANGE, GREY, GREEN = "#0072B2", "#D55E00", "#8a8a8a", "#009E73"
COLOURS = (BLUE, ORANGE, GREEN, "#CC79A7", "#E69F00", "#56B4E9")
"""Told apart without colour vision (Okabe & Ito)."""


def heads_table(setting: Setting, kinds: Mapping[str, Sequence[tt.Head]]) -> xr.Dataset:
    """Which heads were chosen, (kind, rank, part)."""
    variable = Variable(
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
    return setting.table({"number": (variable, numbers)}, coordinates)


def chosen(run: xr.DataTree, kind: str) -> list[tt.Head]:
    """The heads of a kind, strongest first."""
    numbers = run["heads"]["number"].sel(kind=kind).values
    return [tt.Head(int(layer), int(head)) for layer, head in numbers if layer >= 0]


def mean_score(runs: Sequence[xr.DataTree], score: str, kind: str | None) -> float:
    """Mean of a score over the chosen heads (all heads for None) and over seeds."""
    found = []
    for run in runs:
        values = run["scores"][score].values
        heads = [values[head] for head in chosen(run, kind)] if kind else values
        found.append(np.nanmean(heads))
    return float(np.mean(found))


def random_bound(runs: Sequence[xr.DataTree], score: str, kind: str, seed: int = 0) -> float:
    """95th percentile of a score's mean over random sets of as many heads; mean over seeds."""
    bounds = []
    for run in runs:
        values = run["scores"][score].values.ravel()
        rng = np.random.default_rng([seed, 13])
        k = len(chosen(run, kind))
        sets = np.array([rng.permutation(values.size)[:k] for _ in range(2000)])
        bounds.append(np.quantile(np.nanmean(values[sets], axis=1), 0.95))
    return float(np.mean(bounds))


def pyplot() -> Any:
    """matplotlib's pyplot, set to the look of all figures."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    plt.rcParams.update(
        {
            "font.size": 9,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "svg.hashsalt": "twotower",
        }
    )
    return plt


def bar(
    axes: Any,
    x: float,
    estimate: Estimate,
    colour: int,
    label: str,
    named: bool,
    width: float = 0.34,
) -> None:
    """A bar with its interval; `named` bars go into the legend."""
    words = label if named else None
    axes.bar(x, estimate.value, width, color=COLOURS[colour], label=words)
    if np.isfinite(estimate.low):
        spread = [[estimate.value - estimate.low], [estimate.high - estimate.value]]
        axes.errorbar(x, estimate.value, spread, fmt="none", ecolor="black", lw=1, capsize=2)


def line(axes: Any, x: Sequence[float], estimates: Sequence[Estimate], colour: int, label: str):
    """A line of estimates with their intervals as a band."""
    axes.plot(x, [e.value for e in estimates], "o-", ms=4, color=COLOURS[colour], label=label)
    axes.fill_between(
        x,
        [e.low for e in estimates],
        [e.high for e in estimates],
        color=COLOURS[colour],
        alpha=0.18,
        lw=0,
    )
