"""The README's picture: what `make demo` found, drawn from the runs it saved.

Left: how much of the margin each head's knock-out costs. Right: the two towers of every
head. QK AUC says how well its queries and keys find demonstrations of the query's class,
OV AUC how well its values and outputs say the label.

    make demo && python experiments/demo_picture.py
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

import twotower as tt

BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#8a8a8a"  # told apart without colour vision


def main() -> None:
    """Draw the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, default=Path("runs/demo.zarr"))
    parser.add_argument("--selection", type=Path, default=Path("runs/demo-selection.zarr"))
    parser.add_argument("--out", type=Path, default=Path("experiments/figures/demo.png"))
    options = parser.parse_args()

    run, selection = tt.open(options.run).load(), tt.open(options.selection).load()
    heads = [tuple(head) for head in json.loads(run.attrs["in_context_heads"])]
    writers = [tuple(head) for head in json.loads(run.attrs["writing_heads"])]
    accuracy = json.loads(run.attrs["accuracy"])
    effect = selection.effects.margin_drop.mean("prompt").transpose("layer", "head")

    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    figure, (left, middle, right) = plt.subplots(
        1, 3, figsize=(11, 4), width_ratios=(1.3, 1, 1.2), layout="constrained"
    )

    bound = float(np.abs(effect).max())
    image = left.imshow(effect.T, cmap="RdBu_r", vmin=-bound, vmax=bound, aspect="auto")
    for layer, head in heads:
        left.plot(layer, head, "s", mfc="none", mec="black", ms=8, mew=1.1)
    left.set(xlabel="layer", ylabel="head", title="Margin lost when a head is knocked out")
    left.set_yticks(range(effect.sizes["head"]))
    figure.colorbar(image, ax=left, shrink=0.85, label="logits")

    names = ["nothing", f"{len(heads)} in-\ncontext", f"{len(heads)}\nrandom"]
    keys = ["before", "after", "random heads"]
    for offset, (measure, colour, words) in enumerate(
        (("correct", BLUE, "between the labels"), ("top1_correct", ORANGE, "top-1 of all tokens"))
    ):
        values = np.array([accuracy[key][measure][:3] for key in keys])
        x = np.arange(3) + 0.36 * offset - 0.18
        middle.bar(x, values[:, 0], 0.34, color=colour, label=words)
        spread = np.abs(values[:, 1:].T - values[:, 0])
        middle.errorbar(x, values[:, 0], spread, fmt="none", ecolor="black", lw=1, capsize=2)
    n = accuracy["before"]["correct"][3]
    middle.set(ylim=(0, 1.28), yticks=(0, 0.5, 1), title=f"Accuracy, {n} other prompts")
    middle.set_xticks(range(3), names, fontsize=8)
    middle.set_xlabel("heads knocked out, at all positions")
    middle.axhline(0.5, color=GREY, lw=0.8, ls=":")
    middle.legend(frameon=False, loc="upper center", fontsize=8)

    qk, ov = run.scores.qk_auc.values, run.scores.ov_auc.values
    right.scatter(qk, ov, s=10, color=GREY, alpha=0.6, lw=0, label=f"all {qk.size} heads")
    right.axvline(0.5, color=GREY, lw=0.8, ls=":")
    right.axhline(0.5, color=GREY, lw=0.8, ls=":")
    x, y = np.array([(qk[h], ov[h]) for h in heads]).T
    right.scatter(x, y, s=42, marker="s", fc="none", ec="black", label="in-context heads")
    x, y = np.array([(qk[h], ov[h]) for h in writers]).T
    right.scatter(x, y, s=34, color=ORANGE, lw=0, label="heads that write the answer")
    best = max(writers, key=lambda h: qk[h])
    name = f"{best[0]}.{best[1]}"
    right.annotate(name, (qk[best], ov[best]), (0, -13), textcoords="offset points", ha="center")
    right.set(
        xlabel="QK AUC: finds the query's class",
        ylabel="OV AUC: says the label",
        title="The two towers of every head",
        ylim=(-0.36, 1.05),
        yticks=(0, 0.5, 1),
    )
    right.legend(fontsize=8, loc="lower right", frameon=False)

    options.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(options.out, dpi=160)
    figure.savefig(options.out.with_suffix(".svg"))
    print(f"wrote {options.out} and {options.out.with_suffix('.svg')}")


if __name__ == "__main__":
    main()
