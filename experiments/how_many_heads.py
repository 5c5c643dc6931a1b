"""How many heads it takes, and which: knocked out, and kept alone.

Two numbers answer it, for sets of heads chosen on one set of prompts and tested on another,
by accuracy between the labels with all seeds together:

- *needed*: the smallest number of heads whose knock-out (zero) settles the task, that is, takes
  accuracy to where its 95% interval holds chance or lies below it;
- *enough*: the smallest number of heads which, kept alone, settle it. Kept alone means that
  every other head's output is replaced by its mean over the fitting prompts (by role and number
  of demonstration); accuracy is kept where its interval lies above chance, and it does not fall
  below the interval of the accuracy with all heads.

A number counts if the same holds for every larger number that is measured. Both are told for
edits at the last position, where every head still works on the earlier ones, and for edits at
all positions.

Sets come in four kinds. *Effect*: the heads with the largest effects. *Greedy*: each head costs
most together with those before it (knocked out at the last position; from the pool of heads with
the largest effects), and then by effect. *Exact*: the best of all sets of that size among the
eight heads with the largest effects. *Random*: for comparison. Greedy and exact sets are chosen
to be needed; whether they are enough as well is a question put to them.

    python experiments/how_many_heads.py --out runs/experiments
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import xarray as xr

import twotower as tt
from twotower.experiments import parts as common
from twotower.experiments.experiment import Experiment, Judgement, Setting
from twotower.figures import style
from twotower.measures.group_effects import strongest_group, subset_effects
from twotower.results import Variable
from twotower.statistics import Estimate, bootstrap_mean

RULE = """Claim: a dozen heads are needed, and a dozen are enough. By the better of the effect and
the greedy order, with edits at the last position: supported if at most 12 heads are needed and at
most 12 are enough. Not supported if either takes more than a tenth of the model's heads. Else
undecided."""

DOZEN = 12
POOL, STEPS, EXACT = 32, 12, 8
"""Heads that the greedy choice chooses from, how many it chooses, and the pool of exact sets."""
EFFECT, GREEDY, BEST, RANDOM = "effect", "greedy", "exact", "random"
KNOCKED, KEPT = "knocked out", "kept alone"
LAST, ALL = "last", "all"
SIZES = {
    (KNOCKED, LAST): (1, 2, 3, 4, 6, 8, 10, 12, 14, 16, 20, 24, 32, 48),
    (KEPT, LAST): (1, 2, 4, 6, 8, 10, 12, 16, 24, 32, 48, 72, 96, 144, 192),
    (KNOCKED, ALL): (4, 12, 24),
    (KEPT, ALL): (12, 24, 48, 96),
}
"""Numbers of heads, by what is done with them and where."""


LEFT_OUT = (3, 6, 10, 14, 20, 144)
"""Numbers that are left out along the axis, where there is no room."""


# ---- what is measured ---------------------------------------------------------------------


def measure(setting: Setting) -> Mapping[str, xr.Dataset]:
    """Accuracy on test prompts with growing sets of heads knocked out, and kept alone."""
    orders, exact = choose(setting)
    found = {}
    with setting.stage("all heads"):
        clean = tt.predict(setting.model, setting.test)["margin"].values
    for (what, where), sizes in SIZES.items():
        # An edit at all positions costs a forward for each set; half of the prompts do.
        n = setting.size.n_test if where == LAST else setting.size.n_test // 2
        kinds = (*orders, BEST) if what == KNOCKED else tuple(orders)
        sets = {
            (kind, k): exact[k] if kind == BEST else orders[kind][:k]
            for kind in kinds
            for k in sizes
            if kind != BEST or k in exact
        }
        drops = edited(setting, setting.test[:n], sets, what, where)
        found[group_of(what, where)] = curve_table(setting, clean[:n], drops, what, where)
    heads = {**orders, **{f"{BEST} {k}": chosen for k, chosen in exact.items()}}
    return {**found, "heads": common.heads_table(setting, heads)}


def choose(setting: Setting) -> tuple[dict[str, list[tt.Head]], dict[int, list[tt.Head]]]:
    """All heads in three orders, and the best set of each size; on the fitting prompts."""
    model = setting.model
    by_effect = tt.in_context_heads(setting.selection, len(model.heads))
    # Every step sweeps the whole pool, so half of the prompts choose.
    few = setting.fit[: setting.size.n_fit // 2]
    chosen = tt.greedy_heads(model, few, STEPS, pool=by_effect[:POOL])
    pairs = zip(chosen["chosen_layer"].values, chosen["chosen_head"].values, strict=True)
    first = [tt.Head(int(layer), int(head)) for layer, head in pairs]
    with setting.stage("all subsets"):
        subsets = subset_effects(model, few, by_effect[:EXACT], logprobs=False)
    rng = np.random.default_rng([setting.seed, 29])
    orders = {
        EFFECT: by_effect,
        GREEDY: [*first, *(head for head in by_effect if head not in first)],
        RANDOM: [model.heads[i] for i in rng.permutation(len(model.heads))],
    }
    return orders, {k: strongest_group(subsets, k) for k in range(1, EXACT + 1)}


Sets = Mapping[tuple[str, int], Sequence[tt.Head]]


def edited(
    setting: Setting, prompts: tt.Prompts, sets: Sets, what: str, where: str
) -> dict[tuple[str, int], np.ndarray]:
    """Drop of the margin (prompt,) by set, with its heads knocked out or kept alone."""
    model = setting.model
    to = tt.Mean(setting.fit) if what == KEPT else tt.Zero()
    groups = {name: changed_heads(model.heads, heads, what) for name, heads in sets.items()}
    # Two orders can give the same set; a sweep takes each once.
    distinct = sorted(set(groups.values()))
    with setting.stage(f"{what}, {where} positions"):
        effects = tt.group_effects(model, prompts, distinct, where, to=to, logprobs=False)
    drops = effects["margin_drop"].values
    return {name: drops[:, distinct.index(group)] for name, group in groups.items()}


def changed_heads(
    every: Sequence[tt.Head], heads: Sequence[tt.Head], what: str
) -> tuple[tt.Head, ...]:
    """The heads whose output is replaced: these, or all but these."""
    keep = set(heads)
    return tuple(head for head in every if (head in keep) == (what == KNOCKED))


def group_of(what: str, where: str) -> str:
    """Name of the table of what is done with heads at some positions."""
    return f"{what} {where}".replace(" ", "_")


def curve_table(
    setting: Setting,
    clean: np.ndarray,
    drops: Mapping[tuple[str, int], np.ndarray],
    what: str,
    where: str,
) -> xr.Dataset:
    """margin (kind, size, prompt), NaN where not measured, and that with all heads."""
    kinds = (EFFECT, GREEDY, RANDOM, BEST)
    sizes = SIZES[what, where]
    margins = np.full((len(kinds), len(sizes), len(clean)), np.nan)
    for (kind, k), drop in drops.items():
        margins[kinds.index(kind), sizes.index(k)] = clean - drop
    words, definition = common.MEASURES["margin"]
    about = f"{definition}, with the first heads of the kind {what}, at {where} positions"
    return setting.table(
        {
            "margin": (Variable(("kind", "size", "prompt"), "float", words, about), margins),
            "margin_before": (
                Variable(("prompt",), "float", words, f"{definition}, with all heads"),
                clean,
            ),
        },
        {"kind": list(kinds), "size": list(sizes), "prompt": np.arange(len(clean))},
    )


# ---- the verdict --------------------------------------------------------------------------


def judge(runs: list[xr.DataTree]) -> Judgement:
    """By the rule above."""
    numbers: dict[str, Any] = {}
    found: dict[tuple[str, str], dict[str, int | None]] = {}
    for what, where in SIZES:
        spot = f"{where} position{'s' if where == ALL else ''}"
        name = f"{what}, {spot}"
        numbers[f"accuracy with all heads (prompts of: {name})"] = whole(runs, what, where)
        found[what, where] = {}
        for kind in (EFFECT, GREEDY, BEST, RANDOM):
            for k, estimate in curve(runs, what, where, kind).items():
                numbers[f"accuracy, {k} heads {name}, {kind}"] = estimate
            smallest = settles(runs, what, where, kind)
            found[what, where][kind] = smallest
            word = "needed" if what == KNOCKED else "enough"
            if kind != BEST:
                told = "more than measured" if smallest is None else smallest
                numbers[f"heads {word}, {spot}, {kind}"] = told
    n_all = numbers["heads of the model"] = len(common.chosen(runs[0], EFFECT))

    def fewest(what: str) -> float:
        sizes = [found[what, LAST][kind] for kind in (EFFECT, GREEDY)]
        return min((k for k in sizes if k is not None), default=float("inf"))

    needed, enough = fewest(KNOCKED), fewest(KEPT)
    verdict = "undecided"
    if max(needed, enough) <= DOZEN:
        verdict = "supported"
    elif max(needed, enough) > n_all / 10:
        verdict = "not supported"
    reason = (
        f"Of {n_all} heads, at the last position, {_told(needed)} are needed and {_told(enough)} "
        f"are enough (by effect {_told(found[KNOCKED, LAST][EFFECT])} and "
        f"{_told(found[KEPT, LAST][EFFECT])}; at random {_told(found[KNOCKED, LAST][RANDOM])} and "
        f"{_told(found[KEPT, LAST][RANDOM])})."
    )
    return Judgement(verdict, reason, numbers)


def _told(k: float | None) -> str:
    return "more than measured" if k is None or k == float("inf") else str(k)


def whole(runs: list[xr.DataTree], what: str, where: str) -> Estimate:
    """Accuracy with all heads, on the prompts of a curve."""
    margins = common.pooled(runs, group_of(what, where), "margin_before")
    return bootstrap_mean(common.right(margins))


def curve(runs: list[xr.DataTree], what: str, where: str, kind: str) -> dict[int, Estimate]:
    """Accuracy by number of heads, where it was measured."""
    found = {}
    for k in SIZES[what, where]:
        margins = common.pooled(runs, group_of(what, where), "margin", kind=kind, size=k)
        if np.isfinite(margins).any():
            found[k] = bootstrap_mean(common.right(margins))
    return found


def settles(runs: list[xr.DataTree], what: str, where: str, kind: str) -> int | None:
    """The smallest number of heads from which on the task is settled; None if there is none."""
    chance, clean, smallest = common.chance(runs), whole(runs, what, where), None
    for k, estimate in reversed(curve(runs, what, where, kind).items()):
        lost, kept = estimate.low <= chance, estimate.value >= clean.low
        if not (lost if what == KNOCKED else kept and not lost):
            break
        smallest = k
    return smallest


# ---- the picture --------------------------------------------------------------------------


def draw(runs: list[xr.DataTree], judgement: Judgement) -> Any:
    """Accuracy against the number of heads, knocked out and kept alone, by kind of set."""
    plt = common.pyplot()
    figure, axes = plt.subplots(2, 2, figsize=(9.5, 7), layout="constrained", sharey=True)
    for place, (what, where) in zip(axes.flat, SIZES, strict=True):
        band = whole(runs, what, where)
        place.axhspan(band.low, band.high, color=style.GREY, alpha=0.2, lw=0, label="all heads")
        place.axhline(common.chance(runs), color="black", lw=0.8, ls=":", label="chance")
        for colour, kind in enumerate((EFFECT, GREEDY, RANDOM, BEST)):
            values = curve(runs, what, where, kind)
            if values:
                style.line(place, list(values), list(values.values()), colour, kind)
        place.set_xscale("log")
        place.set_xticks([k for k in SIZES[what, where] if k not in LEFT_OUT])
        place.set_xticks([], minor=True)
        place.xaxis.set_major_formatter("{x:.0f}")
        spot = "at the last position" if where == LAST else "at all positions"
        place.set(title=f"{what} {spot}", xlabel=f"heads {what}", ylim=(0, 1.03))
    for place in axes[:, 0]:
        place.set_ylabel("accuracy between the labels")
    # The left column has every kind.
    handles, names = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside upper center", ncols=6, frameon=False)
    return figure


EXPERIMENT = Experiment(
    number=12,
    name="how-many-heads",
    title="How many heads it takes",
    claim="A dozen heads are needed for the task, and a dozen, kept alone at the last position, "
    "are enough.",
    headline="About 1% of the heads, 12 in Llama-7B, are in-context heads; how many it takes, and "
    "which, is left open.",
    rule=RULE,
    measure=measure,
    judge=judge,
    draw=draw,
)

if __name__ == "__main__":
    from twotower.cli import main

    main(["experiments", "run", __file__, *sys.argv[1:]])
