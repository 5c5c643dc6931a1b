"""The circuit of in-context classification: how few heads keep the margin, and what joins them.

A circuit (`tt.circuit`) starts at the answer: the heads that write it, the strongest edges into
their queries, keys and values, and the edges into those sources in turn, by exact effects on some
prompts. On other prompts every head outside it is replaced, at all positions, by its mean over
prompts (Wang et al. 2022), and what is left of the margin is its faithfulness. Beside it stand
equally many heads with the largest effects of their own, the largest estimates by gradients
(attribution patching), and random ones.

The same is done with edges: of all edges into heads' queries, keys and values, and from heads into
the answer, those with the largest exact effects are kept, one effect at a time measured, and all
others are cut at once (`tt.CutEdges`).

The same is asked of indirect objects ("When Mary and John left, John thanked"), whose circuit is
known in another model: GPT-2 has heads that find the duplicate name, inhibit it, and move the other
(Wang et al. 2022, arXiv:2211.00593). Kinds are compared with reservations: this is another model,
and the names of kinds go by other scores here.

    python experiments/circuits.py --out runs/experiments
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import numpy as np
import xarray as xr

import twotower as tt
from twotower.edits.cut import ANSWER
from twotower.experiments import parts as common
from twotower.experiments import questions
from twotower.experiments.experiment import Experiment, Judgement, Setting
from twotower.experiments.random_heads import random_heads
from twotower.figures import style
from twotower.head import parse_head
from twotower.measures.choose import above_others
from twotower.statistics import Estimate, bootstrap, bootstrap_mean

INDIRECT = "indirect-object"
SIZES = (4, 8, 16, 27, 54, 108)
EDGE_SIZES = (120, 1000, 4000, 12000, 30000, 60000, 90000, 110000)
KEPT = 0.8
"""Share of the margin that a circuit is asked to keep."""

HEADS, EDGES = "kept", "edges_kept"
"""Names of the datasets with the margins that heads and edges keep."""

RANKINGS = ("circuit", "effect", "gradient", "random")
EDGE_RANKINGS = ("circuit", "effect", "random")
N_FIT, N_TEST = 8, 16
N_EDGES = 4
"""Prompts on which all edges are ranked by their effects."""

DRAWN = 30
"""Edges of a circuit that the figure shows, strongest first."""

RULE = """Supported if on held-out prompts of in-context classification, with all seeds together
(intervals) and in every seed, at most a tenth of all heads, taken from the circuit in the order of
their strongest edges, keep at least 80% of the margin between the whole model and the model whose
heads are all replaced by their means, and keep more of it than random heads. Not supported if at a
tenth of the heads the interval lies wholly below 80%; else undecided. Indirect objects, heads with
the largest effects, estimates by gradients, and edges instead of heads are reported beside it."""


# ---- what is measured ---------------------------------------------------------------------


def measure(setting: Setting) -> Mapping[str, xr.Dataset]:
    """Circuits on some prompts, and the margins that their heads keep on others."""
    model, size = setting.model, setting.size
    _ = setting.selection  # settles that the task can be done
    n_fit, n_test = (min(n, 2 * size.n_task) for n in (N_FIT, N_TEST))
    found: dict[str, xr.Dataset] = {}
    sizes = [n for n in SIZES if n <= len(model.heads)]
    for words, name in (("classification", setting.task.name), (INDIRECT, INDIRECT)):
        fit = questions.halves(setting, name, n_fit)[0]
        test = questions.halves(setting, name, n_test)[1]
        if name == INDIRECT and not float(tt.predict(model, fit)["margin"].mean()) > 0:
            continue  # the model cannot do it
        with setting.stage(f"{name}: circuit"):
            circuit = tt.circuit(model, fit, depth=2, threshold=0.01, edges=120, seed=setting.seed)
        with setting.stage(f"{name}: gradients"):
            estimates = tt.attribution_patching(model, fit)
        effects = questions.sweep(setting, name, fit)["effects"].to_dataset()
        n = sizes[-1]
        rankings = {
            "circuit": tt.measures.circuit.circuit_heads(circuit),
            "effect": tt.in_context_heads(effects, n),
            "gradient": tt.in_context_heads(estimates, n),
            "random": random_heads(model.heads, n, 1, [setting.seed, 17])[0],
        }
        with setting.stage(f"{name}: heads kept"):
            kept = tt.faithfulness(model, test, rankings, sizes=sizes, to=tt.Mean(test))
        edges = _edges_kept(setting, name, circuit, fit, test)
        found |= {
            f"{words}_circuit": circuit,
            f"{words}_{HEADS}": kept,
            f"{words}_{EDGES}": edges,
        }
    first = questions.halves(setting, setting.task.name, n_fit)[0]
    return {**found, "kinds": questions.kinds(setting, first)}


def _edges_kept(
    setting: Setting, name: str, circuit: xr.Dataset, fit: tt.Prompts, test: tt.Prompts
) -> xr.Dataset:
    """The margins that edges keep, in the order of their effects on other prompts."""
    with setting.stage(f"{name}: effects of all edges"):
        ranked = edges_by_effect(setting.model, fit)
    order = np.random.default_rng([setting.seed, 17]).permutation(len(ranked))
    rankings = {"circuit": circuit, "effect": ranked, "random": [ranked[i] for i in order]}
    sizes = [n for n in EDGE_SIZES if n <= len(ranked)]
    with setting.stage(f"{name}: edges kept"):
        return tt.faithfulness(setting.model, test, rankings, sizes=sizes, to=tt.Mean(test))


def edges_by_effect(model: tt.Model, prompts: tt.Prompts) -> list[tuple[str, str, str]]:
    """All edges, those with the largest absolute mean effect first."""
    few = prompts[:N_EDGES]
    into_heads = tt.edge_effects(model, few, to=tt.Mean(prompts))["margin_drop"].mean("prompt")
    written = above_others(tt.attribution(model, few)["label_logit"]).mean("prompt")
    strengths = {
        edge: abs(float(value))
        for edge, value in into_heads.stack(edge=("source", "target", "into")).to_series().items()
        if np.isfinite(value)
    }
    for layer, head in model.heads:
        edge = (str(tt.Head(layer, head)), ANSWER, ANSWER)
        strengths[edge] = abs(float(written.sel(layer=layer, head=head)))
    return sorted(strengths, key=lambda edge: -strengths[edge])


# ---- the verdict --------------------------------------------------------------------------


def kept(
    runs: list[xr.DataTree],
    words: str,
    ranking: str,
    size: int,
    beyond: str | None = None,
    of: str = HEADS,
) -> Estimate:
    """Share of the margin that some heads or edges keep; beyond another ranking's, if named."""
    parts = []
    for run in runs:
        about = run[f"{words}_{of}"]
        without = about["margin_without"].values
        own = about["margin"].sel(ranking=ranking, size=size).values - without
        if beyond is not None:
            own = own + without - about["margin"].sel(ranking=beyond, size=size).values
        parts.append(np.column_stack([own, about["margin_clean"].values - without]))
    values = np.concatenate(parts)
    values = values[np.isfinite(values).all(axis=1)]

    def statistic(rows: np.ndarray) -> np.ndarray:
        with np.errstate(divide="ignore", invalid="ignore"):
            return values[rows, 0].mean(axis=-1) / values[rows, 1].mean(axis=-1)

    return bootstrap(statistic, len(values))


def asked(runs: list[xr.DataTree]) -> list[str]:
    """The questions that the model can do with all seeds."""
    return [x for x in ("classification", INDIRECT) if all(f"{x}_kept" in run for run in runs)]


def judge(runs: list[xr.DataTree]) -> Judgement:
    """By the rule above."""
    numbers: dict[str, Any] = {}
    tables = {}
    n_heads = runs[0]["kinds"].sizes["layer"] * runs[0]["kinds"].sizes["head"]
    sizes = [int(n) for n in runs[0]["classification_kept"]["size"].values]
    few = [n for n in sizes if n <= n_heads / 10] or sizes[:1]
    for words in asked(runs):
        known = [run[f"{words}_circuit"] for run in runs]
        heads = [tt.measures.circuit.circuit_heads(one.to_dataset()) for one in known]
        numbers[f"{words}: heads in the circuit, mean"] = float(np.mean([*map(len, heads)]))
        edges = [one.sizes["edge"] for one in known]
        numbers[f"{words}: edges in the circuit, mean"] = float(np.mean(edges))
        for ranking in RANKINGS:
            for n in sizes:
                name = f"{words}: share kept by {n} heads, {ranking}"
                numbers[name] = kept(runs, words, ranking, n)
            area = [float(run[f"{words}_kept"]["area"].sel(ranking=ranking)) for run in runs]
            numbers[f"{words}: area, {ranking}"] = float(np.mean(area))
        for ranking in EDGE_RANKINGS:
            for n in _edge_sizes(runs, words, ranking):
                name = f"{words}: share kept by {n} edges, {ranking}"
                numbers[name] = kept(runs, words, ranking, n, of=EDGES)
        tables[f"Heads that keep the margin, {words}"] = _by_number(
            runs, words, HEADS, dict.fromkeys(RANKINGS, sizes)
        )
        tables[f"Edges that keep the margin, {words}"] = _by_number(
            runs, words, EDGES, _all_edge_sizes(runs, words)
        )
        tables[f"Strongest edges, {words}"] = _strongest(runs, words)
    best = max(few, key=lambda n: kept(runs, "classification", "circuit", n).value)
    own = kept(runs, "classification", "circuit", best)
    beyond = kept(runs, "classification", "circuit", best, beyond="random")
    numbers["classification: share kept beyond random heads"] = beyond
    seeds = [
        float(run["classification_kept"]["kept"].sel(ranking="circuit", size=best)) for run in runs
    ]
    verdict = "undecided"
    if own.low >= KEPT and beyond.positive and min(seeds) >= KEPT:
        verdict = "supported"
    elif own.high < KEPT:
        verdict = "not supported"
    reason = (
        f"With {best} of {n_heads} heads, taken from the circuit, {own} of the margin is kept on "
        f"held-out prompts of in-context classification, {beyond} more than with random heads."
        f"{_enough_edges(runs)}"
    )
    return Judgement(verdict, reason, numbers, tables)


def _edge_sizes(runs: list[xr.DataTree], words: str, ranking: str) -> list[int]:
    """Numbers of edges that were kept, as far as the ranking has so many with all seeds."""
    sizes = [int(n) for n in runs[0][f"{words}_{EDGES}"]["size"].values]
    if ranking != "circuit":
        return sizes
    least = min(run[f"{words}_circuit"].sizes["edge"] for run in runs)
    return [n for n in sizes if n <= least]


def _all_edge_sizes(runs: list[xr.DataTree], words: str) -> dict[str, list[int]]:
    return {ranking: _edge_sizes(runs, words, ranking) for ranking in EDGE_RANKINGS}


def _enough_edges(runs: list[xr.DataTree]) -> str:
    """Say how many of the strongest edges were enough, and what as many random ones keep."""
    for n in _edge_sizes(runs, "classification", "effect"):
        own, random = (
            kept(runs, "classification", name, n, of=EDGES) for name in ("effect", "random")
        )
        if own.value >= KEPT:
            return (
                f" Of the edges, tried in {len(EDGE_SIZES)} numbers, the {n:,} of largest effect "
                f"are the first to keep as much: {own}; as many random ones keep {random}."
            )
    return ""


def _by_number(
    runs: list[xr.DataTree], words: str, of: str, sizes: Mapping[str, list[int]]
) -> dict[str, Any]:
    """Table: share of the margin kept, by number of heads or edges and by ranking."""
    rows = [
        [
            f"{n:,}",
            *(kept(runs, words, x, n, of=of) if n in own else "" for x, own in sizes.items()),
        ]
        for n in sizes["effect"]
    ]
    return {"columns": ["heads" if of == HEADS else "edges", *sizes], "rows": rows}


def _strongest(runs: list[xr.DataTree], words: str, n: int = 10) -> dict[str, Any]:
    """Table: the edges that are strongest over all seeds, with the kinds of their heads."""
    effects: dict[tuple[str, str, str], list[np.ndarray]] = {}
    for run in runs:
        one = run[f"{words}_circuit"]
        for i in range(one.sizes["edge"]):
            parts = [str(one[name].values[i]) for name in ("source_name", "target_name", "tower")]
            effects.setdefault((parts[0], parts[1], parts[2]), []).append(
                one["effect"].values[:, i]
            )
    # An edge that a seed did not find counts 0 there.
    order = sorted(effects, key=lambda key: -abs(sum(np.mean(x) for x in effects[key])))
    rows, kinds = [], questions.kinds_of(runs)
    for source, target, tower in order[:n]:
        values = effects[source, target, tower]
        seeds = f"{len(values)} of {len(runs)}"
        both = "; ".join(_named(kinds, name) for name in (source, target))
        rows.append(
            [f"{source} to {target}", tower, bootstrap_mean(np.concatenate(values)), seeds, both]
        )
    return {"columns": ["edge", "into", "effect on the margin", "seeds", "kinds"], "rows": rows}


def _named(kinds: Mapping[tt.Head, list[str]], name: str) -> str:
    """Kinds of a head, or what the source is."""
    if not name[0].isdigit():
        return name.split(" ")[0]
    return ", ".join(kinds[parse_head(name)]) or "no kind"


# ---- the picture --------------------------------------------------------------------------


def draw(runs: list[xr.DataTree], judgement: Judgement) -> Any:
    """Shares of the margin kept by heads and by edges, and the first seed's strongest edges."""
    plt = common.pyplot()
    figure = plt.figure(figsize=(14, 8), layout="constrained")
    axes = figure.subplots(len(asked(runs)), 3, width_ratios=(1, 1, 1.5), squeeze=False)
    for row, words in enumerate(asked(runs)):
        sizes = [int(n) for n in runs[0][f"{words}_{HEADS}"]["size"].values]
        by_heads = dict.fromkeys(RANKINGS, sizes)
        by_edges = _all_edge_sizes(runs, words)
        _curves(axes[row, 0], runs, words, HEADS, by_heads, "heads kept")
        _curves(axes[row, 1], runs, words, EDGES, by_edges, "edges kept")
        axes[row, 0].set_title(words)
        axes[row, 0].set_xticks(sizes, [str(n) for n in sizes])
        circuit = runs[0][f"{words}_circuit"].to_dataset()
        order = abs(circuit["mean_effect"]).argsort().values[::-1]
        tt.figures.circuit(circuit.isel(edge=order[:DRAWN]), ax=axes[row, 2])
    return figure


def _curves(
    ax: Any,
    runs: list[xr.DataTree],
    words: str,
    of: str,
    sizes: Mapping[str, list[int]],
    label: str,
) -> None:
    """Draw shares of the margin by number of heads or edges, a line for each ranking."""
    for ranking, own in sizes.items():
        estimates = [kept(runs, words, ranking, n, of=of) for n in own]
        style.line(ax, own, estimates, RANKINGS.index(ranking), ranking)
    ax.axhline(KEPT, color=style.GREY, lw=0.8, ls=":")
    ax.set_xscale("log", base=2 if of == HEADS else 10)
    ax.set(xlabel=label, ylabel="share of the margin")
    ax.legend(frameon=False, fontsize=8)


EXPERIMENT = Experiment(
    number=17,
    name="circuits",
    title="The circuit of in-context classification",
    claim="A tenth of the heads, found by exact edges from the answer backwards, keep 80% of the "
    "margin when all other heads are replaced by their means.",
    headline="Names about 1% of the heads by their effect when knocked out; what the other heads "
    "are needed for is not asked.",
    rule=RULE,
    measure=measure,
    judge=judge,
    draw=draw,
    prompts="8 prompts of each question to find the circuit on and 16 to keep its heads on",
)

if __name__ == "__main__":
    from twotower.cli import main

    main(["experiments", "run", __file__, *sys.argv[1:]])
