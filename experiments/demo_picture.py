"""The README's picture: what `make demo` found, drawn from the run it saved.

Above: how much of the margin each head's knock-out costs; accuracy with heads knocked out; the
two towers of every head. QK AUC says how well its queries and keys find demonstrations of the
query's class, OV AUC how well its values and outputs say the label. Below: where the head with
the largest effect looks on one prompt.

    make demo && python experiments/demo_picture.py
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import xarray as xr

import twotower as tt
from twotower import figures
from twotower.experiments import parts as common
from twotower.figures import style
from twotower.statistics import Estimate

MEASURES = {"correct": "between the labels", "top1_correct": "top-1 of all tokens"}


def main() -> None:
    """Draw the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, default=Path("runs/demo.zarr"))
    parser.add_argument("--prompt", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("experiments/figures/demo.png"))
    options = parser.parse_args()

    run = tt.open(options.run)
    heads, writers = (
        [tt.Head(*head) for head in json.loads(run.attrs[name])]
        for name in ("in_context_heads", "writing_heads")
    )
    plt = common.pyplot()
    figure = plt.figure(figsize=(11, 6.6), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=(1.45, 1))
    left, middle, right = above.subplots(1, 3, width_ratios=(1.35, 1, 1.2))
    figures.head_map(run, heads=heads, ax=left)
    left.set_title("Margin lost when a head is knocked out", pad=18)
    accuracy(run, len(heads), middle)
    figures.two_towers(run, heads=writers, name="heads that write", ax=right)
    right.set_title("The two towers of every head", pad=18)
    figures.attention(run, heads[0], options.prompt, ax=below.subplots())

    options.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(options.out, dpi=160)
    figure.savefig(options.out.with_suffix(".svg"))
    print(f"wrote {options.out} and {options.out.with_suffix('.svg')}")


def accuracy(run: xr.DataTree, k: int, ax: Any) -> None:
    """Accuracy before, and after the knock-out of in-context heads and of random ones."""
    found = json.loads(run.attrs["accuracy"])
    for x, name in enumerate(("before", "after", "random heads")):
        for side, (measure, words) in enumerate(MEASURES.items()):
            estimate = Estimate(*found[name][measure])
            style.bar(ax, x + 0.36 * side - 0.18, estimate, side, words, x == 0)
    ax.axhline(0.5, color=style.GREY, lw=0.8, ls=":")
    ax.set_xticks(range(3), ["nothing", f"{k} in-\ncontext", f"{k}\nrandom"])
    ax.set(xlabel="heads knocked out, at all positions", ylim=(0, 1.02))
    ax.set_title("Accuracy", pad=18)
    ax.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, borderaxespad=0.2, fontsize=7)


if __name__ == "__main__":
    main()
