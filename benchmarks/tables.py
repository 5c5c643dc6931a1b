"""Write benchmarks/README.md and its pictures from the committed results.

python benchmarks/tables.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from common import RESULTS

FOLDER = Path(__file__).parent
HEAD = """# Benchmarks

Made by `python benchmarks/tables.py` from `results/*.json`; do not edit by hand. A *plain
forward*, the unit of all ratios, is the transformers model itself on the same batch: its own
attention kernel, no cache, logits of the last position only, timed just before and just after
what it is compared with.

    python benchmarks/sweep.py                  # costs of the measures, with limits
    python benchmarks/floors.py --show-diff     # against the arithmetic floors, and the baseline
    .venv-peers/bin/python benchmarks/peers.py  # beside other tools; see the file for its setup

`--promote` makes new results the committed ones.
"""


def load(name: str) -> dict[str, Any] | None:
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else None


def table(columns: list[str], rows: list[list[Any]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines) + "\n"


def floors(result: dict[str, Any]) -> str:
    rows = [
        [
            {"last": "last", "labels": "labels", "all": "all"}.get(r["positions"], r["positions"]),
            f"{r['tokens']:.0f}",
            f"{r['plain_seconds_per_prompt']:.3f}",
            f"{r['forwards']:.2f}",
            f"{r['floor']:.2f}",
            f"{r['ratio']:.2f}",
        ]
        for r in [*result["last_position"], *result["several_positions"]]
    ]
    columns = ["positions", "tokens", "plain forward, s", "sweep, forwards", "floor", "ratio"]
    a, half, gradient = result["analyze"], result["bfloat16"], result["attribution_patching"]
    missed = ", ".join(gradient["missed_of_top_12"]) or "none"
    return "\n".join(
        [
            "## Sweeps against their floors",
            f"All {result['heads']} heads of {result['model']}, margins; "
            f"{result['machine']['processor']}, {result['machine']['threads']} threads. The floor "
            "counts the multiplications that cannot be left out, at the plain forward's own "
            "speed. As prompts grow the sweep tends to one forward.",
            "",
            table(columns, rows),
            "![Cost of the sweep against the length of the prompt](figures/floors.png)",
            "",
            '"all, shared": all prompts have the same demonstrations, which are run once; the '
            "floor is that of prompts by themselves.",
            "",
            f"**All measures** (`analyze`, {a['tokens']:.0f} tokens) take "
            f"{a['forwards']['analyze']:.2f} forwards; their floors sum to "
            f"{sum(a['floors'].values()):.2f} (ratio {a['ratio']:.2f}). The sweep inside nnsight "
            f"takes {a['nnsight_overhead']:+.1%} against the same recorders on PyTorch's hooks.",
            "",
            f"**bfloat16** is {half['speed']:.2f} times as fast as float32 here; the heads' mean "
            f"effects have a rank correlation of {half['rank_correlation']:.3f} with float32's, "
            f"and {half['top_12_in_common']:.0%} of the top 12 in common.",
            "",
            f"**Attribution patching** takes {gradient['forwards']:.2f} forwards. Its rank "
            f"correlation with the exact effects is {gradient['rank_correlation']:.2f} (by prompt "
            f"{gradient['rank_correlation_by_prompt']:.2f}); of the 12 strongest heads it misses "
            f"{len(gradient['missed_of_top_12'])}: {missed}.",
            "",
        ]
    )


def peers(result: dict[str, Any]) -> str:
    ways = result["ways"]
    parts = ["## Beside other tools", ""]
    titles = {
        "last": "Every head knocked out at the last position",
        "all": "Every head knocked out at all positions",
        "towers": "Attention and value-output of all heads",
    }
    for positions, title in titles.items():
        chosen = {k: r for k, r in ways.items() if r["positions"] == positions}
        if not chosen:
            continue
        own = next((r for k, r in chosen.items() if k.startswith(("twotower", "towers"))), None)
        rows = []
        for r in sorted(chosen.values(), key=lambda r: r.get("seconds", 1e9)):
            if "failed" in r:
                rows.append([r["way"], "failed", "", "", "", r["failed"]])
                continue
            times = f"{r['seconds'] / own['seconds']:.1f}" if own else ""
            rows.append(
                [
                    r["way"],
                    f"{r['seconds']:.2f}",
                    f"{r['forwards']:.1f}",
                    times,
                    f"{r['peak_MiB_above_plain']:.0f}",
                    f"{r.get('error', 0):.0e}",
                ]
            )
        columns = ["way", "s per prompt", "plain forwards", "times twotower's", "MiB", "difference"]
        parts += [f"### {title}", "", table(columns, rows)]
    versions = ", ".join(f"{k} {v}" for k, v in result["versions"].items())
    parts += [
        f"One prompt of {next(iter(ways.values()))['tokens']} tokens on {result['model']}; "
        f"{result['machine']['processor']}, {result['machine']['threads']} threads; {versions}. "
        "MiB: peak of the process above its peak after plain forwards. Difference: largest, from "
        "plain PyTorch hooks (for the towers, from twotower), over the largest value.",
        "",
    ]
    return "\n".join(parts)


def picture(result: dict[str, Any]) -> None:
    import matplotlib

    matplotlib.use("Agg")
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
    (FOLDER / "figures").mkdir(exist_ok=True)
    for kind in ("png", "svg"):
        figure.savefig(FOLDER / "figures" / f"floors.{kind}", dpi=160)


def main() -> None:
    parts = [HEAD]
    for name, write in (("peers", peers), ("floors", floors)):
        result = load(name)
        if result is not None:
            parts.append(write(result))
            if name == "floors":
                picture(result)
    parts.append("## GPU\n\nNot measured yet: no GPU was at hand.\n")
    (FOLDER / "README.md").write_text("\n".join(parts))


if __name__ == "__main__":
    main()
