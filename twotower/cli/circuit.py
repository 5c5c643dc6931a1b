"""Command that finds the circuit behind an answer."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..runs.load_settings import Whole
from .sizing import console_of

if TYPE_CHECKING:
    import xarray as xr


def circuit(
    model: str = "smollm2-135m",
    *,
    task: str = "animals-cities",
    n: Whole = 16,
    shots: Whole = 8,
    writers: Whole = 8,
    edges: Whole = 60,
    threshold: float = 0.02,
    depth: Whole = 3,
    k: Whole = 20,
    out: str | None = None,
    json: bool = False,
) -> None:
    """Find the heads that write the answer, and what feeds their queries, keys and values.

    Parameters
    ----------
    model
        Hub id, folder, or smollm2-135m (the demo model).
    task
        A task of classes or of pairs: a bundled name or a file.
    n
        Number of prompts.
    shots
        Demonstrations per prompt; of a task of classes, per label.
    writers
        Largest number of heads that write the answer.
    edges
        Largest number of edges.
    threshold
        Smallest effect of an edge, as a share of the margin.
    depth
        Number of times that sources are searched for their own sources.
    k
        Number of edges to print, strongest first.
    out
        File for the circuit: .zarr, .graphml or .json (Cytoscape's elements).
    json
        Print all edges as JSON.
    """
    from json import dumps, loads

    from ..checks import whole, writable_file
    from ..errors import InputError
    from ..figures.circuits import save_circuit
    from ..measures.circuit import circuit as find
    from ..models import load
    from ..prompts import build_prompts
    from ..prompts.read_task import read_task
    from ..results import save
    from ..results.store import check_place

    whole("k", k, 1)
    known = (".zarr", ".graphml", ".json")
    if out is not None:
        if Path(out).suffix not in known:
            raise InputError(f"{out!r} must end in one of {', '.join(known)}")
        check_place(out) if out.endswith(".zarr") else writable_file(out)
    loaded = load(model)
    prompts = build_prompts(loaded, read_task(task), shots=shots, n=n)
    found = find(loaded, prompts, writers=writers, edges=edges, threshold=threshold, depth=depth)
    if out is not None:
        if out.endswith(".zarr"):
            save(found, out)
        else:
            save_circuit(found, out)
    rows = rows_of(found)
    if json:
        print(dumps(rows, indent=1))
        return
    from rich.table import Table

    table = Table("source", "at", "into", "of", "effect on the margin, 95%", "chance", box=None)
    for row in rows[:k]:
        table.add_row(
            row["source"],
            row["source_at"],
            row["tower"],
            row["target"],
            f"{row['effect']:+.3f} [{row['low']:+.3f}, {row['high']:+.3f}]",
            f"{row['chance']:.3f}",
        )
    console = console_of()
    console.print(table)
    margin = loads(found.attrs["settings"])["margin"]
    console.print(f"{min(k, len(rows))} of {len(rows)} edges; the margin is {margin:.3f}")


def rows_of(found: xr.Dataset) -> list[dict[str, Any]]:
    """Return the edges of a circuit, by absolute effect.

    Parameters
    ----------
    found
        Result of `twotower.circuit`.
    """
    texts = {"source": "source_name", "target": "target_name"}
    texts |= {name: name for name in ("source_at", "target_at", "tower")}
    numbers = {"effect": "mean_effect", "low": "low", "high": "high", "chance": "chance"}
    rows = [
        {name: str(found[variable].values[i]) for name, variable in texts.items()}
        | {name: round(float(found[variable].values[i]), 5) for name, variable in numbers.items()}
        for i in range(found.sizes["edge"])
    ]
    return sorted(rows, key=lambda row: -abs(row["effect"]))
