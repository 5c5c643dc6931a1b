"""How features gather: from a demonstration's text to its label, from the query to the end.

The paper's picture needs something to happen before the in-context heads act. Each label
position must know what its demonstration was about, or there would be nothing for the key
tower to embed; and the last position must know what the query is about. The paper supposes
that shallow layers gather these features, and leaves open how. And it says that the last
position gathers more from near demonstrations than from far ones.

Three looks, layer by layer:

- *Attention*: the share that label positions pay to their own demonstration's text, and the
  last position to the query's.
- *Cutting*: all heads of a window of layers may not look from label positions at any text
  (or from the last position at the query). What does the margin lose?
- *Patching*: all heads of a window write at label positions what they write there in a donor
  prompt, in which the demonstrations' texts have changed sides while all labels stand where
  they stood. What the donor makes of the query is the opposite answer. How much of the way
  there does the patch go?

    python experiments/feature_gathering.py --out runs/experiments
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import xarray as xr

import twotower as tt
from twotower.experiments import parts as common
from twotower.experiments.experiment import Experiment, Judgement, Setting
from twotower.figures import style
from twotower.prompts import Prompts
from twotower.prompts.prompts import assemble
from twotower.prompts.segments import Prompt
from twotower.results import Variable
from twotower.statistics import Estimate, bootstrap, bootstrap_mean, mean_known

WINDOWS = 6
RULE = """Layers fall into six windows; the first three are early, the last three late. Supported
if, with all seeds together (intervals) and in every seed, (1) patching what heads write at label
positions, summed over the early windows, goes further towards the donor's answer than summed over
the late ones, and (2) cutting the last position's attention to the query's text costs more margin
in the early windows than in the late ones. Not supported if one of the two differences lies wholly
below 0; else undecided. Near and far demonstrations are reported beside it."""


# ---- what is measured ---------------------------------------------------------------------


def measure(setting: Setting) -> Mapping[str, xr.Dataset]:
    """Shares of attention, and margins with windows of layers cut or patched."""
    model, size = setting.model, setting.size
    _ = setting.selection  # settles that the task can be done
    test = setting.test[: max(size.n_test // 2, 8)]
    gold = test.gold_index
    texts_swapped, query_replaced = swap_texts(test), test.other_queries(setting.seed)
    label, last = tt.at(role="label"), tt.at(role="last")

    def margins(edits: Any, title: str, prompts: Prompts = test) -> np.ndarray:
        with setting.stage(title):
            found = tt.predict(model, prompts, edits)
        return common.margin_towards(found["logit"].values, gold)

    windows = np.array_split(np.arange(model.n_layers), WINDOWS)
    names = [f"{window[0]}-{window[-1]}" for window in windows]
    edited = np.zeros((len(test), WINDOWS, len(EDITS)))
    for number, window in enumerate(windows):
        heads = [head for head in model.heads if head.layer in window]
        for column, edit in enumerate(
            (
                tt.ScaleAttention(heads, 0, tt.at(role="text"), positions=label),
                tt.ScaleAttention(heads, 0, tt.at(role="query"), positions=last),
                tt.KnockOut(heads, label, to=tt.From(texts_swapped)),
                tt.KnockOut(heads, last, to=tt.From(query_replaced)),
            )
        ):
            edited[:, number, column] = margins(edit, f"layers {names[number]}, {EDITS[column]}")
    about = Variable(
        ("prompt", "window", "edit"), "float", "margin", "towards the prompt's own answer"
    )
    plain = Variable(("prompt", "run"), "float", "margin", "towards the prompt's own answer")
    runs = [margins([], "as it was")] + [
        margins([], title, prompts)
        for title, prompts in (("texts swapped", texts_swapped), ("query", query_replaced))
    ]
    table = setting.table(
        {"edited": (about, edited), "plain": (plain, np.stack(runs, axis=1))},
        {
            "prompt": np.arange(len(test)),
            "window": names,
            "edit": list(EDITS),
            "run": ["as it was", "texts swapped", "query replaced"],
        },
        test,
    )
    attention = tt.qk_similarity(model, test, keep="labels")
    return {
        "margins": table,
        "label_shares": tt.attention_shares(model, test, "labels"),
        "last_shares": tt.attention_shares(model, test, "last"),
        "by_demonstration": _by_demonstration(setting, test, attention),
    }


EDITS = ("text to label cut", "query to last cut", "label positions patched", "last patched")


def swap_texts(prompts: Prompts) -> Prompts:
    """The same prompts, demonstrations' texts of two classes exchanged; labels stay in place."""
    items = [swapped(prompt) for prompt in prompts]
    return assemble(
        items, prompts.labels, prompts.tokenizer, task_name=prompts.task_name, seed=prompts.seed
    )


def swapped(prompt: Prompt) -> Prompt:
    """Demonstration j of a class takes the text of demonstration j of the next class."""
    texts = {s.demonstration: s for s in prompt.segments if s.role == "text"}
    classes = sorted({s.demonstration_class for s in texts.values()})
    of_class = {
        name: [number for number, s in texts.items() if s.demonstration_class == name]
        for name in classes
    }
    partner = {
        number: texts[of_class[other][place]]
        for name, other in zip(classes, classes[1:] + classes[:1], strict=True)
        for place, number in enumerate(of_class[name])
    }
    segments = []
    for s in prompt.segments:
        if s.demonstration >= 0:
            source = partner[s.demonstration]
            text = source.text if s.role == "text" else s.text
            s = replace(s, text=text, demonstration_class=source.demonstration_class)
        segments.append(s)
    return replace(prompt, segments=tuple(segments))


def _by_demonstration(setting: Setting, test: Prompts, qk: xr.Dataset) -> xr.Dataset:
    """Attention of the last position to each demonstration's label, the nearest first."""
    attention = qk["attention"].mean("head").transpose("prompt", "layer", "position")
    values = attention.values[:, :, ::-1]  # label positions stand in the prompt's order
    about = Variable(
        ("prompt", "layer", "demonstration"),
        "float",
        "attention to a demonstration's label",
        "of the last position, mean over heads; 0 is the nearest demonstration",
    )
    coordinates = {
        "prompt": np.arange(len(test)),
        "layer": qk["layer"].values,
        "demonstration": np.arange(values.shape[2]),
    }
    return setting.table({"attention": (about, values)}, coordinates, test)


# ---- the verdict --------------------------------------------------------------------------


def way_to_donor(run: xr.DataTree, edit: str, donor: str) -> np.ndarray:
    """(prompt, window) margin lost, and (prompt,) margin there is to lose with the donor."""
    clean = run["margins"]["plain"].sel(run="as it was").values
    other = run["margins"]["plain"].sel(run=donor).values
    lost = clean[:, None] - run["margins"]["edited"].sel(edit=edit).values
    return np.column_stack([lost, clean - other])


def share(lost: np.ndarray, columns: list[int] | slice) -> Estimate:
    """Share of the way to the donor's margin that some windows go, summed; all prompts alike."""
    lost = lost[np.isfinite(lost).all(axis=1)]
    part = lost[:, :-1][:, columns].sum(axis=1)

    def statistic(rows: np.ndarray) -> np.ndarray:
        return part[rows].mean(axis=-1) / lost[rows, -1].mean(axis=-1)

    return bootstrap(statistic, len(lost))


def judge(runs: list[xr.DataTree]) -> Judgement:
    """By the rule above."""
    half = WINDOWS // 2
    sign = np.repeat([1.0, -1.0], half)
    patched = [way_to_donor(run, EDITS[2], "texts swapped") for run in runs]
    cut = [way_to_donor(run, EDITS[1], "query replaced") for run in runs]
    numbers: dict[str, Any] = {}
    everything = np.concatenate(patched)
    names = [str(name) for name in runs[0]["margins"]["window"].values]
    for number, name in enumerate(names):
        numbers[f"way to the donor, label positions patched in layers {name}"] = share(
            everything, [number]
        )
    for edit in EDITS[:2]:
        lost = np.concatenate([way_to_donor(run, edit, "query replaced") for run in runs])
        for number, name in enumerate(names):
            numbers[f"margin lost, {edit} in layers {name}"] = bootstrap_mean(lost[:, number])
    last = np.concatenate([way_to_donor(run, EDITS[3], "query replaced") for run in runs])
    for number, name in enumerate(names):
        numbers[f"way to the donor, last position patched in layers {name}"] = share(last, [number])

    gathered = bootstrap_mean(everything[:, :-1] @ sign)
    queried = bootstrap_mean(np.concatenate(cut)[:, :-1] @ sign)
    numbers["margin, early less late: label positions patched"] = gathered
    numbers["margin, early less late: query to last cut"] = queried
    near = np.concatenate([near_less_far(run) for run in runs])
    third = near.shape[1] // 3
    for words, layers in (("shallow", slice(third)), ("deep", slice(2 * third, None))):
        numbers[f"attention to the nearer half of the labels less the farther, {words} third"] = (
            bootstrap_mean(near[:, layers].mean(axis=1))
        )
    seeds = [[float(mean_known(x[:, :-1] @ sign)) for x in each] for each in (patched, cut)]
    verdict = "undecided"
    if gathered.positive and queried.positive and min(map(min, seeds)) > 0:
        verdict = "supported"
    elif gathered.negative or queried.negative:
        verdict = "not supported"
    early, late = share(everything, slice(half)), share(everything, slice(half, None))
    reason = (
        f"Patched at label positions, early layers go {early} of the way to the answer for swapped "
        f"texts and late ones {late}; cutting the query from the last position costs {queried} "
        "more margin early than late."
    )
    return Judgement(verdict, reason, numbers)


def near_less_far(run: xr.DataTree) -> np.ndarray:
    """(prompt, layer) attention to the nearer half of the labels less that to the farther."""
    values = run["by_demonstration"]["attention"].values
    half = values.shape[2] // 2
    return values[:, :, :half].sum(axis=2) - values[:, :, -half:].sum(axis=2)


# ---- the picture --------------------------------------------------------------------------


def draw(runs: list[xr.DataTree], judgement: Judgement) -> Any:
    """Shares of attention by layer; windows cut and patched; near and far demonstrations."""
    plt = common.pyplot()
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.6), layout="constrained")
    layers = runs[0]["label_shares"]["layer"].values
    for colour, (group, words) in enumerate(
        (("label_shares", "label position to its text"), ("last_shares", "last position to query"))
    ):
        values = np.concatenate(
            [run[group]["share"].sel(source="own text").mean("head").values for run in runs]
        )
        estimates = [bootstrap_mean(column) for column in values.T]
        style.line(axes[0], layers, estimates, colour, words)
    axes[0].set(xlabel="layer", ylabel="share of attention", title="Attention, mean over heads")
    names = [str(name) for name in runs[0]["margins"]["window"].values]
    for colour, edit in enumerate(EDITS):
        donor = "texts swapped" if edit == EDITS[2] else "query replaced"
        lost = np.concatenate([way_to_donor(run, edit, donor) for run in runs])
        estimates = [bootstrap_mean(lost[:, number]) for number in range(WINDOWS)]
        style.line(axes[1], range(WINDOWS), estimates, colour, edit)
    axes[1].set_xticks(range(WINDOWS), names)
    axes[1].axhline(0, color=style.GREY, lw=0.8, ls=":")
    axes[1].set(xlabel="layers edited", ylabel="margin lost, logits", title="Cut and patched")
    attention = np.concatenate([run["by_demonstration"]["attention"].values for run in runs])
    third = attention.shape[1] // 3
    for colour, (words, part) in enumerate(
        (("shallow third", slice(third)), ("deep third", slice(2 * third, None)))
    ):
        values = attention[:, part].mean(axis=1)
        estimates = [bootstrap_mean(column) for column in values.T]
        style.line(axes[2], range(values.shape[1]), estimates, colour, words)
    axes[2].set(
        xlabel="demonstration, 0 the nearest",
        ylabel="attention to its label",
        title="Last position, mean over heads",
        ylim=(0, None),
    )
    axes[2].xaxis.get_major_locator().set_params(integer=True)
    for each, room in zip(axes, (1.25, 1.4, 1.1), strict=True):
        each.set_ylim(top=room * each.get_ylim()[1])  # for the legend
        each.legend(frameon=False, fontsize=8)
    return figure


EXPERIMENT = Experiment(
    number=10,
    name="feature-gathering",
    title="How features gather",
    claim="Shallow layers gather a demonstration's features at its label position, and the "
    "query's at the last position.",
    headline="Supposed of the shallow layers, and left as an open question; the last position is "
    "said to gather more from nearer demonstrations.",
    rule=RULE,
    measure=measure,
    judge=judge,
    draw=draw,
)

if __name__ == "__main__":
    from twotower.cli import main

    main(["experiments", "run", __file__, *sys.argv[1:]])
