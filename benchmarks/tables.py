"""Write benchmarks/README.md and its pictures from the committed results.

python benchmarks/tables.py
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from common import RESULTS
from gpu import LARGE
from pictures import TITLES, picture_of_floors, picture_of_peers

FOLDER = Path(__file__).parent
HEAD = """# Benchmarks

Made by `python benchmarks/tables.py` from `results/*.json`; do not edit by hand. A *plain
forward*, the unit of all ratios, is the transformers model itself on the same batch: its own
attention kernel, no cache, logits of the last position only, timed just before and just after
what it is compared with; the faster counts.

    python benchmarks/sweep.py                  # costs of the measures, with limits
    python benchmarks/floors.py --show-diff     # against the arithmetic floors, and the baseline
    python benchmarks/features.py               # the same for softcaps, sinks, ALiBi, mixers
    python benchmarks/scaling.py                # against the number of heads, and of tokens
    python benchmarks/quantized.py              # what int8, nf4, bfloat16 and float16 change
    python benchmarks/proof.py                  # what the proof with every batch costs
    python benchmarks/questions.py              # answers by prompt, of several tokens, vectors
    python benchmarks/edges.py                  # exact edges into queries, keys and values
    python benchmarks/edge_estimates.py         # how well attribution patching finds them
    python benchmarks/pair_tasks.py             # how well the demo model does the tasks of pairs
    python benchmarks/large_models.py           # models of seven billion parameters without one
    python benchmarks/gpu.py                    # models of seven billion parameters on a GPU
    python benchmarks/scale.py                  # runs on many workers: throughput, driver, store
    .venv-peers/bin/python benchmarks/peers.py  # beside other tools; see the file for its setup
    .venv-peers/bin/python benchmarks/path_patching.py  # edges beside TransformerLens

`--promote` makes new results the committed ones.
"""


def load(name: str) -> dict[str, Any] | None:
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else None


def table(columns: list[str], rows: list[list[Any]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines) + "\n"


SHARED = (
    '"all, shared": all prompts have the same demonstrations, which are run once; the floor is '
    "that of prompts by themselves."
)
FIFTH = (
    " Of long prompts heads of every fifth layer were swept at labels and at all positions, "
    "against the floor of those."
)


def floor_cells(row: dict[str, Any]) -> list[str]:
    return [
        row["positions"],
        f"{row['tokens']:.0f}",
        f"{row['plain_seconds_per_prompt']:.3f}",
        f"{row['forwards']:.2f}",
        f"{row['floor']:.2f}",
        f"{row['ratio']:.2f}",
    ]


def floors(result: dict[str, Any]) -> str:
    rows = [floor_cells(r) for r in [*result["last_position"], *result["several_positions"]]]
    columns = ["positions", "tokens", "plain forward, s", "sweep, forwards", "floor", "ratio"]
    groups = [[f"{r['what']}: {r['groups']:,}", *floor_cells(r)] for r in result["together"]]
    a, half, gradient = result["analyze"], result["bfloat16"], result["attribution_patching"]
    missed = ", ".join(gradient["missed_of_top_12"]) or "none"
    return "\n".join(
        [
            "## Sweeps against their floors",
            "",
            f"All {result['heads']} heads of {result['model']}, margins; "
            f"{result['machine']['processor']}, {result['machine']['threads']} threads. The floor "
            "counts the multiplications that cannot be left out, at the plain forward's own "
            "speed. As prompts grow the sweep tends to one forward.",
            "",
            table(columns, rows),
            "![Cost of the sweep against the length of the prompt](figures/floors.png)",
            "",
            "### Heads together",
            "",
            "Groups of heads knocked out together, on one short prompt, exactly. What groups share "
            "(runs with the same lower heads, below the layer in which they part) is counted once.",
            "",
            table(["groups", *columns], groups),
            SHARED + (FIFTH if any("heads" in cells[0] for cells in rows) else ""),
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


def features(result: dict[str, Any]) -> str:
    rows = [
        [name, model["heads"], *floor_cells(sweep)]
        for name, model in result["models"].items()
        for sweep in model["sweeps"]
    ]
    timing = ["plain forward, s", "sweep, forwards", "floor", "ratio"]
    load = result["load"]
    beside = f", with {load:.1f} other processes on average" if load >= 0.5 else ""
    words = (
        f"Random models, {result['layers']} layers of width {result['width']}, margins; "
        f"{result['machine']['processor']}, processor time of one thread"
        f"{beside}. "
        "Where only the last position is changed, a mixer (delta rule, convolution, Mamba) runs "
        "on one token for each row, from its state after the others. The floors count products of "
        "matrices and states, not the mixers' other operations."
    )
    columns = ["model", "heads", "positions", "tokens", *timing]
    return "\n".join(["### Further features", "", words, "", table(columns, rows)])


def speed(result: dict[str, Any], way: str, own: str) -> float:
    """How many times as fast as a way twotower is."""
    return result["ways"][way]["seconds"] / result["ways"][own]["seconds"]


def headline(result: dict[str, Any]) -> str:
    """What the comparison comes to, in a sentence."""
    lens, hooks, cache = (speed(result, way, "twotower") for way in ("lens", "hooks", "cache"))
    everywhere = speed(result, "hooks-all", "twotower-all")
    shared = speed(result, "hooks-shared", "twotower-shared")
    return (
        f"**At the last position twotower is {lens:.0f} times as fast as TransformerLens, "
        f"{hooks:.0f} times as fast as plain hooks and {cache:.1f} times as fast as all last "
        "tokens in one batch on the KV cache, the strongest simple alternative; at all positions "
        f"it is {everywhere:.1f} times as fast as plain hooks, and {shared:.1f} times where "
        "prompts share their demonstrations.**"
    )


def peers(result: dict[str, Any]) -> str:
    ways = result["ways"]
    parts = ["## Beside other tools", "", headline(result), ""]
    parts += ["![Seconds per prompt of every way](figures/peers.png)", ""]
    for name, (title, own) in TITLES.items():
        rows = []
        chosen = {key: r for key, r in ways.items() if r["table"] == name}
        for key, r in sorted(chosen.items(), key=lambda pair: pair[1].get("seconds", 1e9)):
            if "failed" in r:
                rows.append([r["way"], f"failed: {r['failed']}", "", "", "", ""])
                continue
            rows.append(
                [
                    r["way"],
                    f"{r['seconds']:.2f}",
                    f"{r['forwards']:.1f}",
                    f"{speed(result, key, own):.1f}",
                    f"{r['peak_MiB_above_plain']:.0f}",
                    f"{r['error']:.0e}" if "error" in r else "reference",
                ]
            )
        columns = ["way", "s per prompt", "plain forwards", "times twotower's", "MiB", "difference"]
        parts += [f"### {title}", "", table(columns, rows)]
    versions = ", ".join(f"{k} {v}" for k, v in result["versions"].items())
    parts += [
        f"All {result['heads']} heads of {result['model']}, one prompt of "
        f"{ways['twotower']['tokens']:.0f} tokens (prompts with common demonstrations: "
        f"{ways['twotower-shared']['tokens']:.0f}); {result['machine']['processor']}, "
        f"{result['machine']['threads']} threads; {versions}.",
        "",
        '"Plain forwards": the time over that of a plain forward of the same prompts, the fastest '
        "that was seen before or after any of the ways. MiB: most memory of the process "
        "while it worked, beyond what it held after plain forwards. Difference: largest, from "
        "plain PyTorch hooks (for the last table, from twotower), over the largest value. nnsight "
        "runs without a KV cache, with which several invokes would be wrong.",
        "",
    ]
    return "\n".join(parts)


def sweep(result: dict[str, Any]) -> str:
    rows = [
        [name, f"{r['seconds_per_prompt']:.3f}", f"{r['forwards']:.2f}"]
        for name, r in result["measures"].items()
    ]
    return "\n".join(
        [
            "## What the measures cost",
            "",
            f"{result['heads']} heads of {result['model']}, {result['prompts']} prompts of "
            f"{result['tokens']['mean']:.0f} tokens; {result['machine']['processor']}, "
            f"{result['machine']['threads']} threads. Loading takes {result['load_seconds']:.1f} "
            "s, the check of the model included.",
            "",
            table(["measure", "s per prompt", "plain forwards"], rows),
        ]
    )


def scaling(result: dict[str, Any]) -> str:
    columns = ["shape", "growing", "from", "to", "sweep, s", "sweep, forwards"]
    columns += ["slope: plain forward", "sweep", "one forward per head", "sweep in forwards"]
    rows = []
    for series in result["by_heads"]:
        first, last, slopes = series["models"][0], series["models"][-1], series["slopes"]
        rows.append(
            [
                series["shape"],
                series["growing"],
                *(f"{r['layers']} x {r['heads_of_a_layer']}" for r in (first, last)),
                f"{first['sweep_seconds']:.3f} to {last['sweep_seconds']:.3f}",
                f"{first['sweep_forwards']:.2f} to {last['sweep_forwards']:.2f}",
                *(
                    f"{slopes[x]:.2f}"
                    for x in ("plain_seconds", "sweep_seconds", "hooks_seconds", "sweep_forwards")
                ),
            ]
        )
    by_length = result["by_length"]
    lengths = [
        [
            f"{r['tokens']:.0f}",
            f"{r['plain_seconds']:.3f}",
            f"{r['sweep_seconds']:.3f}",
            f"{r['sweep_forwards']:.2f}",
        ]
        for r in by_length["lengths"]
    ]
    slopes = by_length["slopes"]
    tokens = by_length["lengths"]
    return "\n".join(
        [
            "## How time grows",
            "",
            f"Random models of width {result['width']} on prompts of "
            f"{result['by_heads'][0]['models'][0]['tokens']:.0f} tokens, margins of all heads at "
            "the last position. Slopes are of the logarithm of the time against the logarithm "
            "of the number of heads L x H: 1 where time grows in proportion. One forward per head "
            "is timed on at most 16 heads of each model.",
            "",
            table(columns, rows),
            f"### With the length of the prompt ({result['model']})",
            "",
            table(["tokens", "plain forward, s", "sweep, s", "sweep, forwards"], lengths),
            f"From {tokens[0]['tokens']:.0f} to {tokens[-1]['tokens']:.0f} tokens the slope is "
            f"{slopes['plain_seconds']:.2f} for a plain forward (and so for one forward per head) "
            f"and {slopes['sweep_seconds']:.2f} for the sweep: in forwards it falls, with slope "
            f"{slopes['sweep_forwards']:.2f}.",
            "",
        ]
    )


def quantized(result: dict[str, Any]) -> str:
    """What each form of the model changes against float32."""
    columns = ["form", "weights, MiB", "accuracy", "same answers", "margin moves by"]
    columns += ["effects: rank corr.", "top 12 in common"]
    scores = {"qk_auc": "QK AUC", "qk_auc_content": "QK AUC, content", "ov_auc": "OV AUC"}
    columns += [f"{words}: rank corr. (largest diff.)" for words in scores.values()]
    rows = [
        [
            name,
            f"{r['weights_MiB']:.0f}",
            f"{r['accuracy']:.2f}",
            f"{r['same_answer']:.0%}",
            f"{r['margin_difference']:.3f}",
            f"{r['rank_correlation']:.3f}",
            f"{r['top_12_in_common']:.0%}",
            *(
                f"{r[f'{x}_rank_correlation']:.3f} ({r[f'{x}_largest_difference']:.3f})"
                for x in scores
            ),
        ]
        for name, r in result["forms"].items()
    ]
    return "\n".join(
        [
            "## What quantization changes",
            "",
            f"{result['model']} on {result['prompts']} prompts, against float32: answers between "
            "the labels, effects of all heads at the last position, and two-tower scores. int8 and "
            "nf4 (bitsandbytes) with float32 beside the quantized layers.",
            "",
            table(columns, rows),
            *_errors(result["forms"]),
        ]
    )


def _errors(forms: dict[str, Any]) -> list[str]:
    """The proof's largest errors and what is allowed, by form and identity."""
    if not all("proof" in form for form in forms.values()):  # results of an older version
        return []
    proofs = [form["proof"]["identities"] for form in forms.values()]
    names = list(dict.fromkeys(name for proof in proofs for name in proof))
    rows = []
    for form, row in forms.items():
        cells = [
            f"{found['error']:.1e} / {found['allowed']:.1e}" if found else ""
            for found in (row["proof"]["identities"].get(name) for name in names)
        ]
        rows.append([form, *cells])
    words = (
        "The proof's largest errors, and what is allowed there. Tolerances follow from each form's "
        "rounding (`twotower/models/rounding.py`)."
    )
    return [words, "", table(["form", *names], rows)]


def questions(result: dict[str, Any]) -> str:
    m, vectors = result["machine"], result["function_vectors"]
    faster = vectors["faster_than_one_hooked_forward_for_each"]
    beyond = ", ".join(
        f"{n} tokens {x:.2f}" for n, x in result["beyond_the_clean_run_over_one_token"].items()
    )
    rows = [[name, f"{x:.2f}"] for name, x in result["plain_forwards"].items()]
    return "\n".join(
        [
            "## What other questions cost",
            "",
            f"Effects of all heads of {result['model']} at the last position; "
            f"{result['prompts']} prompts of {result['tokens']} tokens, {m['processor']}, "
            f"{m['threads']} threads; processor time. Answers by prompt take "
            f"{result['by_prompt_over_labels']:.3f} times the time of labels. Beyond the clean "
            f"run, over answers of one token: {beyond}. Function-vector effects of all "
            f"{vectors['heads']} heads are {faster:.0f} times as fast as a forward with a hook for "
            "each head.",
            "",
            table(["measure", "plain forwards"], rows),
        ]
    )


def _rounds(n: int) -> str:
    return "one round" if n == 1 else f"median of {n} rounds"


def edges(result: dict[str, Any]) -> str:
    rows = [
        [
            name,
            f"{result['edges'][name]:,}",
            f"{found:.1f}",
            f"{result['floor'][name]:.1f}" if name in result["floor"] else "",
            f"{result['over_floor'][name]:.2f}" if name in result["floor"] else "",
        ]
        for name, found in result["plain_forwards"].items()
    ]
    return "\n".join(
        [
            "## Edges",
            "",
            f"{result['prompts']} prompts of {result['tokens']:.0f} tokens, "
            f"{result['machine']['threads']} thread; the heads: {', '.join(result['heads'])}. The "
            "floor counts the rows of one position that edges cannot do without, from the target's "
            "block on; reading, which makes the targets' outputs, is not in it.",
            "",
            table(["edges", "number", "plain forwards", "floor", "ratio"], rows),
        ]
    )


def path_patching(result: dict[str, Any]) -> str:
    seconds = result["seconds"]
    return (
        "Beside TransformerLens's path patching, which runs a forward for each edge, on "
        f"{result['shape']}'s shape ({result['tokens']} tokens, {result['machine']['threads']} "
        f"thread): all {result['edges']:,} edges from heads into queries took "
        f"{seconds['twotower, all']:.0f} s here, and {seconds['TransformerLens, each']:.2f} s for "
        f"each there, {result['times_faster']:.0f} times as long. The effects, of up to "
        f"{result['largest_effect']:.2g}, agree to {result['largest_difference']:.0e}.\n"
    )


def edge_estimates(result: dict[str, Any]) -> str:
    rows = []
    for into, found in result["edges"].items():
        recall = [f"{found['recall'].get(str(k), float('nan')):.2f}" for k in (10, 30, 100, 300)]
        rows.append(
            [
                into,
                found["number"],
                *recall,
                found["rank correlation of sizes"],
                f"{found['strongest exact']:.2f}",
                f"{found['its estimate']:.2f}",
            ]
        )
    columns = ["into", "edges", *(f"of {k}" for k in (10, 30, 100, 300))]
    columns += ["rank correlation", "strongest edge", "its estimate"]
    return "\n".join(
        [
            "Attribution patching, which estimates edges to first order, against exact effects "
            f"({len(result['heads'])} heads, {result['prompts']} prompts): share of the strongest "
            "edges that it finds among its own strongest, and the strongest edge itself.",
            "",
            table(columns, rows),
        ]
    )


def proof(result: dict[str, Any]) -> str:
    m = result["machine"]
    rows = [[name, f"{added:.1%}"] for name, added in result["cost"].items()]
    older = ""
    if "over_older_version" in result:
        found = ", ".join(f"{name} {x:.2f}" for name, x in result["over_older_version"].items())
        older = f" Over a version without proofs, in processes that took turns: {found}."
    return "\n".join(
        [
            "## What the proof costs",
            "",
            f"{result['model']}, {result['prompts']} prompts of up to {result['tokens']} tokens, "
            f"{m['processor']}, {m['threads']} threads. The proof's own seconds over those of the "
            "measure without them. Two runs of one measure differ by more on such a machine, so "
            f"both were taken in one run ({_rounds(result['rounds'])}). `predict` of a small "
            "model has little to do beside its proof.",
            "",
            table(["measure", "proof"], rows),
            f"A look at the model's state takes {result['look_milliseconds']:.0f} ms "
            f"({result['look_7b_milliseconds']:.0f} ms for Llama-7B's shape), the proof of a new "
            f"state {result['second_forward_seconds']:.1f} s once.{older}",
            "",
        ]
    )


def large_models(result: dict[str, Any]) -> str:
    """Time and memory of each model, and the memory that was planned and allowed."""
    gib = 2**30
    memory, times = [], []
    for name, found in result["models"].items():
        stages = {stage["name"]: stage for stage in found["stages"]}
        load = stages["load and check"]["seconds"]
        sizes = ("weights_bytes", "peak_bytes", "planned_bytes", "allowed")
        memory.append([name, f"{load:.0f}", *(f"{found[size] / gib:.2f}" for size in sizes)])
        for measure, one in found["measures"].items():
            times.append(
                [
                    name,
                    measure,
                    f"{one['seconds_per_prompt']:.1f}",
                    f"{one['forwards']:.2f}",
                    f"{1000 * one['seconds_per_head']:.1f}",
                    f"{one['tokens_per_second']:.1f}",
                    f"{stages[measure]['peak_bytes']['cpu'] / gib:.2f}",
                ]
            )
    first = next(iter(result["models"].values()))
    of_memory = ["model", "load, s", "weights", "peak", "planned", "allowed"]
    of_time = ["model", "measure", "s per prompt", "plain forwards", "ms per head", "tokens/s"]
    return "\n".join(
        [
            "## Models of seven billion parameters without a GPU",
            "",
            f"Random weights, one prompt of {first['tokens']:.0f} tokens; "
            f"{first['machine']['processor']}, {first['machine']['threads']} threads, "
            f"{first['machine']['memory_bytes'] / gib:.0f} GiB. Sizes are GiB of resident memory "
            "of the whole process; loading makes, quantizes and checks the model; planned: what "
            "`twotower plan` says; allowed: 1.25 times the weights and 1.5 GiB.",
            "",
            table(of_memory, memory),
            table([*of_time, "peak"], times),
        ]
    )


def scale(result: dict[str, Any]) -> str:
    """Throughput of one and two workers, and of simulated clusters."""
    measured, size = result["measured"], result["measured"]["1 workers"]["unit_bytes"]
    rows = [
        [
            name.replace("1 workers", "1 worker"),
            f"{one['prompts_per_second']:.2f}",
            f"{one['unit_seconds']:.2f}",
            f"{one['driver_share']:.2%}",
            f"{one['writing_share']:.2%}",
        ]
        for name, one in measured.items()
    ]
    clusters = [
        [
            name,
            row["workers"],
            f"{row['units_per_second']:.1f}",
            f"{row['efficiency']:.0%}",
            row["limit"],
        ]
        for name, lines in result["simulated"].items()
        for row in lines
    ]
    return "\n".join(
        [
            "## Runs on many workers",
            "",
            f"`twotower analyze --engine ray` on {result['model']}, units of "
            f"{result['unit_prompts']} prompts, one thread a worker; "
            f"{result['machine']['processor']}. Two workers are {result['speedup_of_two']:.2f} "
            "times as fast as one, in the steady state (median of three rounds). Between units: "
            "what a worker waits for the driver and its mark; writing: its share of a unit.",
            "",
            table(["", "prompts/s", "s per unit", "between units", "writing"], rows),
            f"Simulated from these units' times ({size / 1e6:.1f} MB a unit, "
            f"{result['unit_bytes_labels'] / 1e6:.2f} with keep='labels'), from the driver's "
            f"{1000 * result['driver_seconds']:.2f} ms a unit, and from this disk's "
            f"{result['disk_bytes_per_second'] / 1e6:.0f} MB/s, all of which go through one "
            "queue. Where units are fast the store is the first limit; keep='labels' moves it "
            "most, larger units move the driver's.",
            "",
            table(["cluster", "workers", "units/s", "of ideal", "limit"], clusters),
        ]
    )


MEASURES = ("plain forward", "head effects, margins", "analyze")


def gpu(result: dict[str, Any] | None) -> str:
    columns = ["model", "measure", "tokens", "batch", "s per prompt", "plain forwards"]
    columns += ["ms per head", "share of peak", "GiB above weights"]
    if result is None:
        blank = [""] * 5
        rows = [
            [shape, measure, length, "", *blank]
            for shape in LARGE
            for length in (100, 500)
            for measure in MEASURES
        ]
        words = "No GPU was at hand: `benchmarks/gpu.py` fills this table where there is one."
        return "\n".join(["## GPU", "", words, "", table(columns, rows)])
    rows, loads = [], []
    for shape, found in result["shapes"].items():
        loads.append(f"{shape} {found['load_seconds']:.1f} s ({found['weights_GiB']:.1f} GiB)")
        for r in found["measures"]:
            head = r.get("seconds_per_head")
            rows.append(
                [
                    shape,
                    r["measure"],
                    f"{r['tokens']:.0f}",
                    r["batch_size"],
                    f"{r['seconds_per_prompt']:.4f}",
                    f"{r['forwards']:.2f}" if "forwards" in r else "",
                    "" if head is None else f"{1000 * head:.3f}",
                    f"{r['share_of_peak']:.0%}",
                    f"{r['peak_GiB_above_weights']:.1f}",
                ]
            )
    words = (
        f"Random weights in {result['dtype']} on {result['device']}, whose measured peak is "
        f"{result['matrix_peak_tflops']:.0f} TFLOP/s (the product of two large matrices); the "
        f"share of it counts the floor's operations. Made and checked in: {', '.join(loads)}."
    )
    return "\n".join(["## GPU", "", words, "", table(columns, rows)])


def page() -> str:
    """The text of benchmarks/README.md."""
    parts = [HEAD]
    sections = {"sweep": sweep, "peers": peers, "floors": floors}
    sections |= {"features": features, "scaling": scaling}
    sections |= {
        "proof": proof,
        "quantized": quantized,
        "large_models": large_models,
        "questions": questions,
        "edges": edges,
        "path_patching": path_patching,
        "edge_estimates": edge_estimates,
        "scale": scale,
    }
    for name, write in sections.items():
        result = load(name)
        if result is not None:
            parts.append(write(result))
    return "\n".join([*parts, gpu(load("gpu"))])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where README.md is written")
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "README.md").write_text(page(), encoding="utf-8")

    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "twotower"
    for name, draw in (("peers", picture_of_peers), ("floors", picture_of_floors)):
        result = load(name)
        if result is not None:
            draw(result, folder / "figures")


if __name__ == "__main__":
    main()
