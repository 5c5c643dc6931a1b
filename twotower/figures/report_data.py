"""Data of a report: the heads of a run, its prompts, and the comparison of two runs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import InputError
from ..results import measured_prompts
from ..results.missing import named
from ..results.schema import head_columns
from .packing import pack
from .texts import compared
from .views import (
    N_MARKED,
    PromptView,
    head_table,
    marked_heads,
    not_finite,
    part_of,
    prompt_view,
    prompts_of,
)

if TYPE_CHECKING:
    import xarray as xr

FEW_PROMPTS = 4
"""Minimum number of prompts in a report; heads are left out to keep it."""

EXPECTED = ("effects", "attribution", "scores")
"""Groups whose columns a report lists as missing if the run lacks them."""

ABOUT = (
    "model",
    "model_revision",
    "dtype",
    "quantization",
    "task",
    "labels",
    "seed",
    "device_map",
    "attention_kernel",
    "prompts_hash",
    "tokenizer_hash",
    "settings",
    "prompts",
    "versions",
    "git_commit",
    "created",
)
"""Attributes of a run in the report, in this order."""


def table_of(run: xr.DataTree) -> xr.Dataset | None:
    """Return the head table; None if the run has no numbers of heads."""
    try:
        return head_table(run)
    except InputError as error:
        if "no numbers of heads" not in str(error):
            raise
        return None


def run_data(run: xr.DataTree, name: str, table: xr.Dataset | None) -> dict[str, Any]:
    """Return a run's data except its prompts, as JSON values.

    Parameters
    ----------
    run
        One run.
    name
        Its name in the report.
    table
        Its head table, or None.
    """
    notes = []
    if table is None:
        notes.append("This run holds no numbers of heads.")
    elif "margin_drop" in table and "effects" not in run.children:
        notes.append(f"Effect on margin: {table['margin_drop'].attrs.get('long_name', '')}.")
    for group, words in (
        ("effects", "effects"),
        ("qk", "QK scores and attention"),
        ("ov", "OV label logits"),
    ):
        if group not in run.children and not (
            group == "effects" and table is not None and "margin_drop" in table
        ):
            notes.append(f"This run holds no {words}.")
    total = max((node.sizes.get("prompt", 0) for node in run.children.values()), default=0)
    measured, lost = len(prompts_of(run)), not_finite(run)
    if measured + len(lost) < total:
        notes.append(f"{measured + len(lost)} of {total} prompts are measured so far.")
    if lost:
        notes.append(f"{named(lost, total)} have logits that are not finite, and are left out.")
    layers, heads = _axes(run, table)
    return {
        "name": name,
        "about": [[key, str(run.attrs[key])] for key in ABOUT if str(run.attrs.get(key, ""))],
        "numbers": _numbers(run, measured, len(layers) * len(heads)),
        "notes": notes,
        "layers": layers,
        "heads": heads,
        "columns": {} if table is None else {str(x): _flat(table[x].values) for x in table},
        "missing": [
            name
            for name, (group, _) in head_columns().items()
            if group in EXPECTED and (table is None or name not in table)
        ],
        "marked": [list(head) for head in marked_heads(run)],
        "kinds": _kinds(run, layers, heads),
        "circuit": _circuit(run),
    }


def _kinds(run: xr.DataTree, layers: list[int], heads: list[int]) -> list[str]:
    """Return the names of each head's kinds (layer x head,), if the run has them."""
    if "kinds" not in run.children:
        return []
    named = part_of(run, "kinds", "layer", "head")["kind"]
    named = named.reindex(layer=layers, head=heads, fill_value="")
    return [str(x) for x in named.transpose("layer", "head").values.ravel()]


def _circuit(run: xr.DataTree) -> dict[str, Any] | None:
    """Return a run's circuit, if it has one."""
    if "circuit" not in run.children:
        return None
    from .circuits import circuit_data  # imports torch

    return circuit_data(run.children["circuit"].to_dataset(inherit=False))


def columns_of(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the columns of all runs, with their display settings."""
    return [
        {"name": name, "title": about.title, "centre": about.chance, "signed": about.signed}
        for name, (_, about) in head_columns().items()
        if any(name in run["columns"] for run in runs)
    ]


COMPARED = {
    "model": "models",
    "task": "tasks",
    "labels": "labels",
    "prompts_hash": "prompts",
    "seed": "seeds",
    "dtype": "dtypes",
    "quantization": "quantizations",
}


def differences(first: xr.DataTree, second: xr.DataTree) -> str:
    """Return a sentence with the differences between two runs; "" if there are none."""
    found = [
        words for key, words in COMPARED.items() if first.attrs.get(key) != second.attrs.get(key)
    ]
    return f"The two runs are of different {', '.join(found)}." if found else ""


def comparison(first: xr.Dataset, second: xr.Dataset) -> list[dict[str, Any]]:
    """Compare two runs by column: rank correlation, and the number of shared top heads.

    Parameters
    ----------
    first, second
        Their head tables.

    Raises
    ------
    InputError
        If the two runs do not have the same heads.
    """
    from scipy.stats import spearmanr

    if any(not first[dim].equals(second[dim]) for dim in ("layer", "head")):
        sizes = [f"{t.sizes['layer']} x {t.sizes['head']}" for t in (first, second)]
        raise InputError(
            f"the runs cannot be compared head by head: {sizes[0]} and {sizes[1]} heads"
        )
    found = []
    for name, (_, about) in head_columns().items():
        if name not in first or name not in second:
            continue
        a, b = (table[name].values.ravel().astype(float) for table in (first, second))
        both = np.isfinite(a) & np.isfinite(b)
        k = max(1, min(N_MARKED, int(both.sum()) // 3))  # with few heads all would be shared
        varied = both.sum() > 2 and np.ptp(a[both]) > 0 and np.ptp(b[both]) > 0
        top = [set(np.argsort(-np.where(both, x, -np.inf), kind="stable")[:k]) for x in (a, b)]
        found.append(
            {
                "name": name,
                "title": about.title,
                "correlation": float(spearmanr(a[both], b[both]).statistic) if varied else None,
                "shared": len(top[0] & top[1]),
                "of": k,
            }
        )
    return found


def prompt_data(
    run: xr.DataTree, table: xr.Dataset | None, prompts: Sequence[int] | None, budget: int
) -> tuple[list[dict[str, Any]], list[str], dict[str, Any]]:
    """Return prompts with the values of heads at their positions, as many as fit the budget.

    Parameters
    ----------
    run, table
        One run, and its head table or None.
    prompts
        Numbers of prompts; by default all.
    budget
        Number of characters.

    Returns
    -------
    list of dict
        Summary of each prompt.
    list of str
        Each prompt, packed.
    dict
        `heads`: the included heads (None for all); `of`: the number of requested prompts.
    """
    if not {"qk", "ov"} & set(run.children):
        return [], [], {"heads": None, "of": 0}
    wanted = prompts_of(run) if prompts is None else list(prompts)
    if not wanted:
        return [], [], {"heads": None, "of": 0}
    chosen = None
    view = prompt_view(run, wanted[0])
    size = len(_packed(view, None))
    few = min(FEW_PROMPTS, len(wanted))
    if size * few > budget:
        bare = len(_packed(view, []))  # tokens and texts, without heads
        n = (0.95 * budget / few - bare) / (size - bare) * len(view.layers) * len(view.heads)
        chosen = _strongest(run, table, view, max(1, int(n)))
    runs_data: list[dict[str, Any]] = []
    packed: list[str] = []
    used = 0
    for number in wanted:
        view = prompt_view(run, number) if number != view.number else view
        text = _packed(view, chosen)
        about = {
            "number": view.number,
            "gold": view.gold,
            "query_class": view.query_class,
            "labels": view.labels,
            "answer": _plain(view.answer),
        }
        used += len(text) + 2 * len(json.dumps(about))
        if packed and used > budget:
            break
        packed.append(text)
        runs_data.append(about)
    return runs_data, packed, {"heads": chosen, "of": len(wanted)}


def _packed(view: PromptView, heads: Sequence[Sequence[int]] | None) -> str:
    header = {
        "tokens": view.tokens.tolist(),
        "roles": view.roles.tolist(),
        "named": [[int(i), view.name_of(i)] for i in view.named],
        "labelTexts": view.label_texts.tolist(),
        "classes": view.classes.tolist(),
        "positions": view.positions.tolist(),
        "tops": {name: x.tolist() for name, x in view.top_tokens.items()},
    }
    arrays = {}
    values_of = dict(view.values)
    if {"score", "score_content"} <= set(values_of):
        values_of["score_position"] = values_of["score"] - values_of["score_content"]
    for name, values in values_of.items():
        flat = values.reshape(-1, *values.shape[2:])  # (layer x head, position, ...)
        if heads is not None:
            width = len(view.heads)
            rows = [view.layers.index(x) * width + view.heads.index(y) for x, y in heads]
            flat = flat[np.array(rows, dtype=int)]
        arrays[name] = flat
    return pack(header, arrays, fine=("attention",))  # shading needs more than three digits


def _strongest(
    run: xr.DataTree, table: xr.Dataset | None, view: PromptView, n: int
) -> list[list[int]]:
    """Return n heads: the marked ones, then those with the largest numbers."""
    chosen = [list(head) for head in marked_heads(run)][:n]
    if table is None:
        ranked = [[x, y] for x in view.layers for y in view.heads]
    else:
        values = next(iter(table.data_vars.values()))
        distance = np.nan_to_num(np.abs(values.values - head_columns()[str(values.name)][1].chance))
        order = np.argsort(-distance, axis=None, kind="stable")
        width = len(view.heads)
        ranked = [[view.layers[i // width], view.heads[i % width]] for i in order]
    for head in ranked:
        if len(chosen) >= n:
            break
        if head not in chosen:
            chosen.append(head)
    return chosen


def _axes(run: xr.DataTree, table: xr.Dataset | None) -> tuple[list[int], list[int]]:
    found = table
    for name in ("qk", "ov", "effects", "attribution"):
        if found is None and name in run.children:
            found = run.children[name].to_dataset(inherit=False)
    if found is None:
        return [], []
    return [int(x) for x in found["layer"].values], [int(x) for x in found["head"].values]


def _flat(values: np.ndarray) -> list[float | None]:
    """Return (layer x head,) values with seven digits, None for NaN, for JSON."""
    return [float(f"{x:.7g}") if np.isfinite(x) else None for x in values.ravel()]


def _numbers(run: xr.DataTree, measured: int, heads: int) -> list[list[str]]:
    """Return the summary numbers: prompts, heads, accuracy."""
    found = [["prompts", str(measured)], ["heads", str(heads)]]
    labels = json.loads(run.attrs.get("labels", "[]"))
    between = compared(run.attrs.get("answers") == "by prompt", len(labels))
    if "predictions" in run.children and measured:
        answers = measured_prompts(run.children["predictions"])
        found += [
            [f"accuracy {between}", f"{float(answers['correct'].mean()):.2f}"],
            ["accuracy over the vocabulary", f"{float(answers['top1_correct'].mean()):.2f}"],
        ]
    if len(labels) > 1:
        found.append([f"chance {between}", f"{1 / len(labels):.2f}"])
    return found


def _plain(answer: dict[str, Any]) -> dict[str, Any]:
    return {
        name: [round(float(x), 3) for x in value] if isinstance(value, np.ndarray) else value
        for name, value in answer.items()
    }
