"""The pictures of benchmarks/README.md, drawn from the committed results."""

from __future__ import annotations

from pathlib import Path
from typing import Any

TITLES = {
    # table: title, its way with twotower
    "last": ("Every head knocked out at the last position", "twotower"),
    "all": ("Every head knocked out at all positions", "twotower-all"),
    "shared": (
        "Every head knocked out at all positions, demonstrations shared",
        "twotower-shared",
    ),
    "towers": ("Attention, QK and value-output vectors of all heads", "towers"),
}


def picture_of_floors(result: dict[str, Any], folder: Path) -> None:
    from matplotlib import pyplot as plt

    rows = result["last_position"]
    tokens = [r["tokens"] for r in rows]
    figure, axes = plt.subplots(figsize=(5, 3.2), layout="constrained")
    axes.plot(tokens, [r["forwards"] for r in rows], "o-", color="#0072b2", label="measured")
    axes.plot(tokens, [r["floor"] for r in rows], "--", color="#d55e00", label="arithmetic floor")
    axes.axhline(1, color="0.6", linewidth=0.8)
    axes.set(
        xscale="log",
        xlabel="tokens of the prompt",
        ylabel="plain forwards",
        title=f"Knocking out all {result['heads']} heads, one at a time",
        ylim=(0, None),
    )
    axes.set_xticks(tokens, [f"{t:.0f}" for t in tokens])
    axes.minorticks_off()
    axes.legend(frameon=False)
    save(figure, "floors", folder)


def picture_of_peers(result: dict[str, Any], folder: Path) -> None:
    """Bars by table, twotower's in another colour and named by their seconds."""
    from matplotlib import pyplot as plt

    tables = {
        title: sorted(
            (r for r in result["ways"].values() if r["table"] == name and "seconds" in r),
            key=lambda r: -r["seconds"],
        )
        for name, (title, _) in TITLES.items()
    }
    heights = [len(rows) + 1 for rows in tables.values()]
    figure, parts = plt.subplots(
        len(tables),
        1,
        figsize=(8, 0.27 * sum(heights) + 0.8),
        sharex=True,
        height_ratios=heights,
        layout="constrained",
    )
    for axes, (title, rows) in zip(parts, tables.items(), strict=True):
        own = [r["way"].startswith("twotower") for r in rows]
        colours = ["#d55e00" if mine else "#0072b2" for mine in own]
        bars = axes.barh([r["way"] for r in rows], [r["seconds"] for r in rows], color=colours)
        texts = [
            f"{r['seconds']:.2f}" if r["seconds"] < 10 else f"{r['seconds']:.0f}" for r in rows
        ]
        axes.bar_label(bars, texts, padding=3, fontsize=8)
        axes.set_title(title, loc="left", fontsize=9)
        axes.set_xscale("log")
        axes.margins(x=0.12)
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
        for label, mine in zip(axes.get_yticklabels(), own, strict=True):
            label.set_fontweight("bold" if mine else "normal")
    parts[-1].set_xlabel("seconds per prompt (logarithmic)", fontsize=9)
    save(figure, "peers", folder)


def save(figure: Any, name: str, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for kind in ("png", "svg"):
        # Without a date, so that the same numbers give the same file.
        metadata = {"Date": None} if kind == "svg" else {}
        figure.savefig(folder / f"{name}.{kind}", dpi=160, metadata=metadata)
