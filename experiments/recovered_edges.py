"""Are the edges found that are there? Edges of planted models, recovered as noise grows.

In a planted model (`twotower.testing`) one lower head gathers the feature of each demonstration's
text at its label, and of the query at the last position; matching heads compare the two. So the
gathering head feeds each matching head's queries at the last position and its keys at the label
positions, and nothing else in the model feeds anything that carries the class. Two findings are
judged, neither of which knows the planting:

- *By effect*: the edges with the largest effects on the answer among all edges from heads and MLPs
  into the queries, keys and values of all heads.
- *By parts*: the pair of sources, one in the query tower and one in the key tower, that makes the
  largest difference between labels of the query's class and other labels in a head's score.

    python experiments/recovered_edges.py
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import xarray as xr

import twotower as tt
from experiments.recovery import ACCURACY, against_noise, carry_out
from twotower.experiments import parts as common
from twotower.testing import Planting

FINDINGS = {
    "effects": "largest effects: edges into queries and keys",
    "pairs": "largest pairs of sources in the scores",
}


def recover(planting: Planting) -> dict[str, Any]:
    """Share of the planted edges that each finding names, and how far others stay below."""
    model = planting.load()
    prompts = planting.prompts(model, n=12, shots=3)
    sources = [*model.heads, *(f"mlp {layer}" for layer in range(model.n_layers))]
    drops = tt.edge_effects(model, prompts, sources, positions="labels").margin_drop
    effects = abs(drops.mean("prompt")).stack(edge=("source", "target", "into")).dropna("edge")
    planted = {
        (str(planting.gather), str(head), into) for head in planting.match for into in ("q", "k")
    }
    strongest = effects.sortby(-effects)["edge"].values[: len(planted)]
    own = np.array([edge in planted for edge in effects["edge"].values])
    pairs = class_pairs(model, prompts, planting.match)
    gathered = pairs.sel(source=str(planting.gather), key_source=str(planting.gather))
    largest = pairs.max(("source", "key_source"))
    return {
        "accuracy": float(tt.predict(model, prompts).correct.mean()),
        "effects": len(planted & set(strongest)) / len(planted),
        "pairs": float((gathered == largest).mean()),
        "weakest planted": float(effects.values[own].min()),
        "strongest other": float(effects.values[~own].max()),
        "share of pairs": float((gathered / abs(pairs).sum(("source", "key_source"))).mean()),
    }


def class_pairs(model: tt.Model, prompts: tt.Prompts, heads: Sequence[tt.Head]) -> xr.DataArray:
    """(chosen, source, key_source) difference between labels of the query's class and others."""
    parts = tt.score_parts(model, prompts, heads, pairs=True).score_part
    same = parts.demonstration_class == parts.query_class
    there = parts.role == "label"
    means = [parts.where(there & chosen).mean("position") for chosen in (same, ~same)]
    return (means[0] - means[1]).mean("prompt")


def draw(rows: Sequence[dict[str, Any]]) -> Any:
    """Edges recovered against noise, and the gap between planted and other edges."""
    plt = common.pyplot()
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.5, 3.8), layout="constrained")
    against_noise(left, rows, {"accuracy": ACCURACY} | FINDINGS)
    left.set(ylabel="share recovered, or accuracy", ylim=(-0.03, 1.03))
    names = ("weakest planted", "strongest other")
    against_noise(right, rows, {name: f"{name} edge" for name in names})
    right.set(ylabel="absolute effect on the margin, mean", ylim=(0, None))
    return figure


def section(result: dict[str, Any]) -> str:
    """The study's section of experiments/README.md."""
    rows = result["rows"]
    lines = [
        "| noise | accuracy | largest effects | largest pairs | weakest planted edge "
        "| strongest other edge |",
        "|---|---|---|---|---|---|",
    ]
    for noise in sorted({row["noise"] for row in rows}):
        here = [row for row in rows if row["noise"] == noise]
        cells = [
            f"{np.mean([row[name] for row in here]):.2f}"
            for name in ("accuracy", *FINDINGS, "weakest planted", "strongest other")
        ]
        lines.append(f"| {noise:g} | {' | '.join(cells)} |")
    clean = [row for row in rows if row["noise"] == 0]
    worst = max(row["strongest other"] / row["weakest planted"] for row in clean)
    n = len({(row["architecture"], row["seed"]) for row in rows})
    return "\n".join(
        [
            "## Are the edges found that are there?",
            "",
            f"In the same {n} plantings the gathering head feeds the queries and the keys of every "
            "matching head ([recovered_edges.py](recovered_edges.py)). Share of these edges among "
            "the largest effects of all edges from heads and MLPs, share of matching heads whose "
            "scores tell classes apart most by the gathering head in both towers, and mean effects "
            "on the margin:",
            "",
            *lines,
            "",
            "![Planted edges recovered against noise](figures/recovered-edges.png)",
            "",
            f"Without noise every other edge has at most {worst:.2g} of the effect of the weakest "
            "planted one in its model: what remains there goes through the norms, whose statistics "
            "depend on every write.",
            "",
        ]
    )


if __name__ == "__main__":
    carry_out("recovered-edges", recover, draw, section, __doc__)
