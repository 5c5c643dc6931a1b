"""How features gather: what feeds the keys at the labels, and the queries at the last position.

The paper's picture needs something to happen before the in-context heads act. Each label
position must know what its demonstration was about, or there would be nothing for the key
tower to embed; and the last position must know what the query is about. The paper supposes
that shallow layers gather these features, and leaves open how.

Edges answer in its own terms. A source below an in-context head (all heads of a layer, a single
head, an MLP, the embedding) writes what it writes in a donor prompt, but only for this head's keys
at the label positions, or only for its queries at the last position:

- for keys the donor's demonstrations have exchanged texts between classes, and every label
  stands where it stood;
- for queries the donor asks about a text of another class.

So nothing but the class of a text differs. If the source carries the class, the head finds its
labels by the donor's classes, and its QK AUC falls towards its mirror image, 1 - AUC. The drop
is what the source carries. Of the layers below a head, the lower half is compared
with the upper half.

Control: in planted models (`twotower.testing`) one head gathers the class for both towers. The same
measurement must name it.

    python experiments/feature_gathering.py --out runs/experiments
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import xarray as xr

import twotower as tt
from twotower.experiments import parts as common
from twotower.experiments.experiment import Experiment, Judgement, Setting
from twotower.figures import style
from twotower.head import parse_head
from twotower.prompts import Prompts
from twotower.prompts.prompts import assemble
from twotower.prompts.segments import Prompt
from twotower.results import Variable
from twotower.statistics import Estimate, bootstrap_mean, mean_known
from twotower.testing import Planting

TOWERS = {"k": "keys", "q": "queries"}
PLANTED = ("gpt2", "gptj", "llama", "neox")
NAMED = 8
"""Number of heads that the page names for each tower."""

RULE = """For each in-context head of layer l, layers 0 to l-1 fall into a lower and an upper half
(with l odd, the middle layer belongs to neither). The drop of the head's QK AUC is summed over the
layers of each half, all heads of a layer together, and averaged over the in-context heads.
Supported if, with all seeds together (intervals) and in every seed, the lower half's drop is larger
than the upper half's through the keys at the labels, and through the queries at the last position.
Not supported if one of the two differences lies wholly below 0; else undecided. It is undecided
too if in a planted model the gathering head is not the strongest through both towers. Single heads,
MLPs, the embedding, and the effects of the same edges on the answer are reported beside it."""


# ---- what is measured ---------------------------------------------------------------------


def measure(setting: Setting) -> Mapping[str, xr.Dataset]:
    """Drops of the in-context heads' QK AUC and of the margin, by source and tower."""
    model = setting.model
    heads = [head for head in setting.heads if head.layer]  # below layer 0 are no heads
    test = setting.test[: max(setting.size.n_test // 2, 8)]
    donors = {"k": swap_texts(test), "q": test.other_queries(setting.seed)}
    drops, clean = towers(setting, test, heads, everything(model), donors)
    effects = []
    layers = by_layer(model)
    for into, donor in donors.items():
        with setting.stage(f"edges into {TOWERS[into]}"):
            found = tt.edge_effects(
                model, test, layers, heads, into=into, positions="labels", to=tt.From(donor)
            )
        effects.append(found["margin_drop"].sel(into=into).values)
    with setting.stage("margins"):
        margins = [tt.predict(model, one)["margin"].values for one in (test, *donors.values())]
    along = ("prompt", "source", "target", "tower")
    table = setting.table(
        {
            "qk_auc_drop": (
                Variable(
                    along, "float", "drop of the QK AUC", "with a donor's write of the source"
                ),
                drops,
            ),
            "qk_auc": (
                Variable(("prompt", "target"), "float", "QK AUC", "of the clean run"),
                clean,
            ),
            "margin_drop": (
                Variable(
                    ("prompt", "sources_layer", "target", "tower"),
                    "float",
                    "drop of the margin",
                    "with a donor's write of all heads of a layer",
                ),
                np.stack(effects, axis=-1),
            ),
            "margin": (
                Variable(("prompt", "run"), "float", "margin", "between the donors' labels"),
                np.stack(margins, axis=1),
            ),
        },
        {
            "prompt": np.arange(len(test)),
            "source": names_of(model),
            "target": [str(head) for head in heads],
            "tower": list(TOWERS),
            "sources_layer": np.arange(model.n_layers),
            "run": ["as it was", "texts swapped", "query replaced"],
        },
        test,
    )
    return {
        "drops": table,
        "label_shares": tt.measures.shares.attention_shares(model, test, "labels"),
        "last_shares": tt.measures.shares.attention_shares(model, test, "last"),
        "planted": _planted(setting),
    }


def by_layer(model: tt.Model) -> list[list[tt.Head]]:
    """All heads of each layer, as groups of sources."""
    return [[head for head in model.heads if head.layer == n] for n in range(model.n_layers)]


def everything(model: tt.Model) -> list[Any]:
    """Heads of a layer together, single heads, MLPs, and the embedding."""
    mlps = [f"mlp {layer}" for layer in range(model.n_layers)]
    return [*by_layer(model), *model.heads, *mlps, "embedding"]


def names_of(model: tt.Model) -> list[str]:
    """Names of the same sources."""
    layers = range(model.n_layers)
    mlps = [f"mlp {layer}" for layer in layers]
    return [*(f"layer {n}" for n in layers), *map(str, model.heads), *mlps, "embedding"]


def towers(
    setting: Setting,
    prompts: Prompts,
    heads: Sequence[tt.Head],
    sources: Sequence[Any],
    donors: Mapping[str, Prompts],
) -> tuple[np.ndarray, np.ndarray]:
    """(prompt, source, target, tower) drops of the QK AUC, and (prompt, target) QK AUCs."""
    drops = []
    for into, donor in donors.items():
        with setting.stage(f"what feeds {TOWERS[into]}"):
            found = tt.towers_of(setting.model, prompts, heads, sources, to=tt.From(donor))
        drops.append(found["qk_auc_drop"].sel(into=into).values)
    return np.stack(drops, axis=-1), found["qk_auc"].values


def _planted(setting: Setting) -> xr.Dataset:
    """Drops of the matching heads' QK AUC in planted models, by the gathering head and others."""
    values = np.zeros((len(PLANTED), 2, 2))
    for row, name in enumerate(PLANTED):
        planting = Planting.random(name, setting.seed)
        model = planting.load()
        prompts = planting.prompts(model, n=12, shots=3)
        donors = {"k": swap_texts(prompts), "q": prompts.other_queries(setting.seed)}
        own = replace(setting, model=model)
        drops, _ = towers(own, prompts, planting.match, model.heads, donors)
        mean = np.nan_to_num(mean_known(drops, axis=0)).mean(axis=1)  # (source, tower)
        gather = list(model.heads).index(planting.gather)
        values[row] = [mean[gather], np.delete(mean, gather, axis=0).max(axis=0)]
    about = Variable(
        ("architecture", "source", "tower"),
        "float",
        "drop of the QK AUC",
        "mean over prompts and matching heads; the strongest of the other heads",
    )
    coordinates = {
        "architecture": list(PLANTED),
        "source": ["gathering head", "other head"],
        "tower": list(TOWERS),
    }
    return setting.table({"qk_auc_drop": (about, values)}, coordinates)


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


# ---- the verdict --------------------------------------------------------------------------


def halves(run: xr.DataTree, name: str = "qk_auc_drop") -> np.ndarray:
    """(prompt, tower, half) drops: sums over half of the layers below a head, mean over heads."""
    found = run["drops"][name]
    if name == "qk_auc_drop":
        found = found.sel(source=[f"layer {n}" for n in run["drops"]["sources_layer"].values])
    values = found.values  # (prompt, layer, target, tower)
    below = [parse_head(str(name)).layer for name in run["drops"]["target"].values]
    sums = []
    for target, layer in enumerate(below):
        own = values[:, :layer, target]
        half = layer // 2
        sums.append([own[:, :half].sum(axis=1), own[:, layer - half :].sum(axis=1)])
    return np.transpose(mean_known(np.array(sums), axis=0), (1, 2, 0))


def drop(runs: list[xr.DataTree], sources: Sequence[str], tower: str) -> Estimate:
    """Drop of the QK AUC by some sources one by one, summed; mean over the in-context heads."""
    lost = [_of_sources(run, sources, tower).sum(axis=1) for run in runs]
    return bootstrap_mean(np.concatenate(lost))


def judge(runs: list[xr.DataTree]) -> Judgement:
    """By the rule above."""
    layers = [f"layer {n}" for n in runs[0]["drops"]["sources_layer"].values]
    sources = [str(name) for name in runs[0]["drops"]["source"].values]
    heads = [name for name in sources if name[0].isdigit()]
    mlps = [name for name in sources if name.startswith("mlp")]
    clean = np.concatenate([run["drops"]["qk_auc"].values.mean(axis=1) for run in runs])
    numbers: dict[str, Any] = {
        "QK AUC of the in-context heads": bootstrap_mean(clean),
        "drop of the QK AUC, if everything were the donor's": bootstrap_mean(2 * clean - 1),
    }
    for tower, words in TOWERS.items():
        for window in np.array_split(np.arange(len(layers)), min(6, len(layers))):
            name = f"drop of the QK AUC, {words}, heads of layers {window[0]}-{window[-1]}"
            numbers[name] = drop(runs, [layers[n] for n in window], tower)
        for name, some in (("all heads", layers), ("MLPs", mlps), ("embedding", ["embedding"])):
            numbers[f"drop of the QK AUC, {words}, {name}, one by one"] = drop(runs, some, tower)
    differences, seeds = {}, []
    for column, (tower, words) in enumerate(TOWERS.items()):
        each = [halves(run)[:, column] for run in runs]
        both = np.concatenate(each)
        for half, name in enumerate(("lower", "upper")):
            numbers[f"drop of the QK AUC, {words}, {name} half"] = bootstrap_mean(both[:, half])
        differences[tower] = bootstrap_mean(both[:, 0] - both[:, 1])
        numbers[f"drop of the QK AUC, {words}, lower less upper half"] = differences[tower]
        seeds += [float(mean_known(one[:, 0] - one[:, 1])) for one in each]
        margin = np.concatenate([halves(run, "margin_drop")[:, column] for run in runs])
        numbers[f"drop of the margin, {words}, lower less upper half"] = bootstrap_mean(
            margin[:, 0] - margin[:, 1]
        )
    planted = np.array([run["planted"]["qk_auc_drop"].values for run in runs])
    named = (planted[:, :, 0] > planted[:, :, 1]).all(axis=-1)
    numbers["planted models whose gathering head is the strongest through both towers"] = (
        f"{int(named.sum())} of {named.size}"
    )
    verdict = "undecided"
    if all(one.positive for one in differences.values()) and min(seeds) > 0:
        verdict = "supported"
    elif any(one.negative for one in differences.values()):
        verdict = "not supported"
    if not named.all():
        verdict = "undecided"
    reason = (
        "Lower half of the layers below an in-context head less the upper half: through the keys "
        f"at the labels the QK AUC falls by {differences['k']} more, through the queries by "
        f"{differences['q']} more; in {int(named.sum())} of {named.size} planted models the "
        "gathering head is named."
    )
    tables = {
        f"Heads that feed {words}": _who(runs, heads, tower, shares, looks)
        for (tower, words), (shares, looks) in zip(
            TOWERS.items(),
            (("label_shares", "label to its text"), ("last_shares", "last to the query")),
            strict=True,
        )
    }
    return Judgement(verdict, reason, numbers, tables)


def _who(
    runs: list[xr.DataTree], heads: Sequence[str], tower: str, shares: str, looks: str
) -> dict[str, Any]:
    """Table: the heads with the largest drops, the part of each, and what they attend to."""
    drops = np.concatenate([_of_sources(run, heads, tower) for run in runs])
    mean = mean_known(drops, axis=0)
    rows = []
    for place in np.argsort(-mean)[:NAMED]:
        layer, head = parse_head(heads[place])
        attention = [
            run[shares]["share"].sel(source="own text", layer=layer, head=head).values
            for run in runs
        ]
        looking = bootstrap_mean(np.concatenate(attention))
        rows.append([heads[place], bootstrap_mean(drops[:, place]), looking])
    return {"columns": ["head", "drop of the QK AUC", f"attention, {looks}"], "rows": rows}


def _of_sources(run: xr.DataTree, sources: Sequence[str], tower: str) -> np.ndarray:
    """(prompt, source) drops, mean over the in-context heads; 0 where a source is not below."""
    values = run["drops"]["qk_auc_drop"].sel(source=list(sources), tower=tower).values
    return np.nan_to_num(values).mean(axis=-1)


# ---- the picture --------------------------------------------------------------------------


def draw(runs: list[xr.DataTree], judgement: Judgement) -> Any:
    """Drops by layer of the source, through keys and queries; heads, MLPs, and the answer."""
    plt = common.pyplot()
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.6), layout="constrained")
    layers = runs[0]["drops"]["sources_layer"].values
    for place, kind in zip(axes, ("layer", "mlp"), strict=False):
        for colour, (tower, words) in enumerate(TOWERS.items()):
            values = np.concatenate(
                [_of_sources(run, [f"{kind} {n}" for n in layers], tower) for run in runs]
            )
            estimates = [bootstrap_mean(column) for column in values.T]
            style.line(place, layers, estimates, colour, f"through {words}")
    for colour, (column, words) in enumerate(zip((0, 1), TOWERS.values(), strict=True)):
        values = np.concatenate(
            [
                np.nan_to_num(run["drops"]["margin_drop"].values[..., column]).sum(axis=-1)
                for run in runs
            ]
        )
        estimates = [bootstrap_mean(one) for one in values.T]
        style.line(axes[2], layers, estimates, colour, f"through {words}")
    titles = ("Heads of a layer", "MLPs", "Heads of a layer, on the answer")
    for place, title in zip(axes, titles, strict=True):
        place.axhline(0, color=style.GREY, lw=0.8, ls=":")
        place.set(xlabel="layer of the source", title=title)
        place.legend(frameon=False, fontsize=8)
    axes[0].set_ylabel("drop of the QK AUC, mean over in-context heads")
    axes[2].set_ylabel("drop of the margin, sum over in-context heads")
    return figure


EXPERIMENT = Experiment(
    number=10,
    name="feature-gathering",
    title="How features gather",
    claim="Shallow layers gather a demonstration's features at its label position, and the "
    "query's at the last position.",
    headline="Supposed of the shallow layers, and left as an open question.",
    rule=RULE,
    measure=measure,
    judge=judge,
    draw=draw,
    prompts="60 prompts to choose the in-context heads on and 30 to measure their edges on",
    version=2,
)

if __name__ == "__main__":
    from twotower.cli import main

    main(["experiments", "run", __file__, *sys.argv[1:]])
