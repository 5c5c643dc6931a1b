"""Figures of all heads: the head map, the two towers, effects by layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import InputError
from ..results.schema import head_columns
from ..statistics import bootstrap_mean
from .style import BLUE, GREY, ORANGE, drawn, whole_numbers
from .views import head_table, marked_heads, one_run, part_of

if TYPE_CHECKING:
    import xarray as xr
    from matplotlib.axes import Axes

    from ..head import Head

N_NAMED = 5


def column(table: xr.Dataset, by: str) -> xr.DataArray:
    """Return a column of the head table.

    Raises
    ------
    InputError
        If the run lacks it.
    """
    if not isinstance(by, str) or by not in table:
        raise InputError(f"by={by!r} is not in the run; it has {', '.join(map(str, table))}")
    return table[by]


@drawn(5.2, 3.4)
def head_map(
    run: xr.DataTree, *, by: str = "margin_drop", heads: Sequence[Head] | None = None, ax: Axes
) -> None:
    """Draw a map of one number per head, by layer and head, with some heads marked.

    Parameters
    ----------
    run
        Result of `analyze` or `open`.
    by
        "margin_drop", "label_logit", "qk_auc", "qk_auc_content" or "ov_auc"; see `head_table`.
    heads
        Heads to mark; by default the run's in-context heads, or the 12 with the largest
        effect.
    ax
        Axes to draw on; by default of a new figure.

    Returns
    -------
    matplotlib.axes.Axes

    Raises
    ------
    InputError
        If the run lacks the numbers or heads.
    """
    run = one_run(run)
    values = column(head_table(run), by)
    centre = head_columns()[by][1].chance
    finite = values.values[np.isfinite(values.values)]
    bound = float(np.abs(finite - centre).max()) if finite.size else 1.0
    image = ax.pcolormesh(
        values["layer"],
        values["head"],
        values.T,
        cmap="RdBu_r",
        vmin=centre - (bound or 1),
        vmax=centre + (bound or 1),
        shading="nearest",
        rasterized=True,
    )
    marked = _within(values, marked_heads(run, heads))
    if marked:
        x, y = zip(*marked, strict=True)
        ax.scatter(
            x,
            y,
            s=36,
            marker="s",
            fc="none",
            ec="black",
            lw=1.1,
            label=f"marked heads ({len(marked)})",
        )
        ax.legend(loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0.2)
    words = str(values.attrs.get("long_name", by)).partition(",")[0]  # the short form
    ax.set(xlabel="layer", ylabel="head")
    ax.figure.colorbar(image, ax=ax, shrink=0.9, label=words)
    whole_numbers(ax.xaxis)
    whole_numbers(ax.yaxis)


def _within(values: xr.DataArray, heads: Sequence[Head]) -> list[Head]:
    """Check that all heads are in the run, and return them.

    Raises
    ------
    InputError
        With the missing head.
    """
    for head in heads:
        if head.layer not in values["layer"].values or head.head not in values["head"].values:
            raise InputError(f"the run has no head {head}")
    return list(heads)


@drawn(4.2, 3.8)
def two_towers(
    run: xr.DataTree,
    *,
    heads: Sequence[Head] | None = None,
    name: str = "marked heads",
    ax: Axes,
) -> None:
    """Plot OV AUC against QK AUC of every head; larger points are larger effects.

    Parameters
    ----------
    run, heads, ax
        As in `head_map`.
    name
        Legend entry of the marked heads.

    Returns
    -------
    matplotlib.axes.Axes

    Raises
    ------
    InputError
        If the run has no scores.
    """
    from matplotlib.collections import PathCollection

    run = one_run(run)
    table = head_table(run)
    qk, ov = (column(table, name).values for name in ("qk_auc", "ov_auc"))
    size = np.full(qk.shape, 14.0)
    if "margin_drop" in table:
        effect = np.nan_to_num(np.abs(table["margin_drop"].values))
        size = 6 + 120 * effect / (effect.max() or 1)
    if not (np.isfinite(qk) & np.isfinite(ov)).any():
        raise InputError("no head has both AUCs: no prompt allows a comparison")
    marked = _within(table["qk_auc"], marked_heads(run, heads))
    rows = {int(x): i for i, x in enumerate(table["layer"].values)}
    columns = {int(x): i for i, x in enumerate(table["head"].values)}
    at = tuple(np.array([(rows[x], columns[y]) for x, y in marked], dtype=int).reshape(-1, 2).T)
    rest = np.ones(qk.shape, dtype=bool)
    rest[at] = False
    style: dict[str, Any] = {"lw": 0.4, "ec": "white"}
    ax.scatter(qk[rest], ov[rest], s=size[rest], color=GREY, alpha=0.7, label="heads", **style)
    if marked:
        words = f"{name} ({len(marked)})"
        ax.scatter(qk[at], ov[at], s=size[at], color=ORANGE, alpha=0.9, label=words, **style)
    named: list[tuple[float, float]] = []
    for layer, head in marked:
        x, y = (float(v[rows[layer], columns[head]]) for v in (qk, ov))
        # Skip names that would overlap another.
        if len(named) < N_NAMED and all(abs(x - a) > 0.12 or abs(y - b) > 0.06 for a, b in named):
            ax.annotate(f"{layer}.{head}", (x, y), (0, -12), textcoords="offset points", fontsize=7)
            named.append((x, y))
    ax.axvline(0.5, color=GREY, lw=0.8, ls=":")
    ax.axhline(0.5, color=GREY, lw=0.8, ls=":")
    ax.set(
        xlabel="QK AUC: finds the query's class",
        ylabel="OV AUC: says the label",
    )
    legend = ax.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, borderaxespad=0.2)
    for handle in legend.legend_handles:
        if isinstance(handle, PathCollection):
            handle.set_sizes([24])


@drawn(5.2, 3.0)
def effect_by_layer(run: xr.DataTree, *, ax: Axes) -> None:
    """Draw each layer's effects: the sum over heads, and the largest.

    Parameters
    ----------
    run
        Result of `analyze` or `open`. If it has effects by prompt, bars have 95% bootstrap
        intervals over prompts.
    ax
        Axes to draw on; by default of a new figure.

    Returns
    -------
    matplotlib.axes.Axes

    Raises
    ------
    InputError
        If the run has no effects.
    """
    run = one_run(run)
    mean = column(head_table(run), "margin_drop")
    layers, total = mean["layer"].values, mean.sum("head", skipna=False).values
    ax.bar(layers, total, 0.7, color=BLUE, label="all heads, summed")
    if "effects" in run.children:
        drop = part_of(run, "effects", "prompt", "layer", "head")["margin_drop"].sortby("layer")
        # NaN if one head's effect is missing: a sum without it is not the sum of all heads.
        by_layer = drop.sum("head", skipna=False).transpose("layer", "prompt").values
        found = [bootstrap_mean(x) for x in by_layer]
        spread = [
            [e.value - e.low for e in found],
            [e.high - e.value for e in found],
        ]
        if np.isfinite(spread).all():
            ax.errorbar(layers, total, spread, fmt="none", ecolor="black", lw=0.8)
    ax.plot(layers, mean.max("head").values, "o", ms=4, color=ORANGE, label="largest head")
    ax.axhline(0, color=GREY, lw=0.8)
    ax.set(xlabel="layer", ylabel="margin lost when knocked out")
    whole_numbers(ax.xaxis)
    ax.legend()
