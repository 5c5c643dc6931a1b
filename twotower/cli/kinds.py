"""Command that names what the heads of a model do."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..runs.load_settings import Whole
from .sizing import console_of

if TYPE_CHECKING:
    import xarray as xr

    from ..head import Head

LEAST_AUC = 0.9
"""Least AUC of heads in the rows of the two towers."""


def kinds(
    model: str = "smollm2-135m",
    *,
    task: str | None = None,
    k: Whole = 5,
    n: Whole = 24,
    shots: Whole = 8,
    json: bool = False,
) -> None:
    """Show which heads look at previous tokens, repeat, copy, suppress or carry a task.

    Parameters
    ----------
    model
        Hub id, folder, or smollm2-135m (the demo model).
    task
        A task of classes or of pairs, for the scores that need one: a bundled name or a file.
    k
        Number of heads for each kind, strongest first.
    n
        Number of prompts.
    shots
        Demonstrations per prompt; of a task of classes, per label.
    json
        Print JSON.
    """
    from json import dumps

    from ..checks import whole
    from ..measures.head_kinds import head_kinds
    from ..models import load
    from ..prompts import build_prompts
    from ..prompts.read_task import read_task

    for name, number, least in (("k", k, 1), ("n", n, 1), ("shots", shots, 0)):
        whole(name, number, least)
    loaded = load(model)
    prompts = None
    if task is not None:
        prompts = build_prompts(loaded, read_task(task), shots=shots, n=n)
    rows = rows_of(head_kinds(loaded, prompts), k)
    if json:
        print(dumps(rows, indent=1))
        return
    from rich.table import Table

    table = Table("kind", "least", "heads with score and its 95% interval", box=None)
    for row in rows:
        heads = ", ".join(
            f"{head['head']} {head['score']:.2f} ± {head['error']:.2f}"
            + (f" (size {head['size']:.2f})" if "size" in head else "")
            for head in row["heads"]
        )
        table.add_row(row["kind"], f"{row['least']:g}", heads or "none")
    console_of().print(table)


def rows_of(found: xr.Dataset, k: int) -> list[dict[str, Any]]:
    """Return for each kind the k strongest heads that reach its threshold.

    Prompts of classes add two rows: heads whose QK or OV AUC is at least `LEAST_AUC`, with the
    largest sizes. An AUC alone says nothing about size.

    Parameters
    ----------
    found
        Result of `head_kinds`.
    k
        Number of heads.
    """
    from ..measures.choose import strongest
    from ..measures.head_kinds import KINDS

    rows = []
    for kind, (score, least) in KINDS.items():
        if score not in found:
            continue
        named = found["kind"].astype(str).str.split("part", ", ")
        has = (named == kind).any("part")
        values = found[score] if least > 0 else -found[score]
        heads = [
            {"head": str(head), **_numbers(found, head, score=score, error=f"{score}_error")}
            for head in strongest(values.where(has), k)
        ]
        rows.append({"kind": kind, "score": score, "least": least, "heads": heads})
    for tower in ("qk", "ov"):
        if f"{tower}_auc" not in found:
            continue
        auc, size = f"{tower}_auc", f"{tower}_size"
        heads = [
            {"head": str(head), **_numbers(found, head, score=auc, error=f"{auc}_error", size=size)}
            for head in strongest(found[size].where(found[auc] >= LEAST_AUC), k)
        ]
        kind = f"{tower.upper()} AUC, by size"
        rows.append({"kind": kind, "score": auc, "least": LEAST_AUC, "heads": heads})
    return rows


def _numbers(found: xr.Dataset, head: Head, **names: str) -> dict[str, float]:
    """Return a head's values of some variables, under other names."""
    own = found.sel(layer=head.layer, head=head.head)
    return {name: round(float(own[variable]), 4) for name, variable in names.items()}
