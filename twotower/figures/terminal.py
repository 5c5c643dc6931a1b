"""A run in the terminal: its heads as a table, a prompt coloured by a head's attention."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import InputError
from ..results.schema import head_columns
from .texts import control_free
from .views import PromptView, head_table, marked_heads, prompt_view

if TYPE_CHECKING:
    import xarray as xr
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from ..head import Head

MOST_WIDTH = 1000
MOST_NAME = 24
"""Maximum number of characters of a class or label in a table."""


def rows_of(run: xr.DataTree, by: str | None, k: int) -> list[dict[str, Any]]:
    """Return the k strongest heads with all their numbers, strongest first.

    By default ranks by the first column of the schema that the run has.

    Raises
    ------
    InputError
        If the run lacks the column `by`.
    """
    table = head_table(run)
    by = by or next(name for name in head_columns() if name in table)
    if by not in table:
        raise InputError(f"by={by!r} is not in the run; it has {', '.join(map(str, table))}")
    marked = set(marked_heads(run))
    frame = (
        table.to_dataframe(dim_order=["layer", "head"])
        .dropna(how="all", subset=[str(name) for name in table])  # places without a head
        .reset_index()
        .sort_values(by, ascending=False, kind="stable")
    )
    records = frame.head(k).to_dict("records")
    rows = [{str(name): value for name, value in record.items()} for record in records]
    for row in rows:
        row["in_context"] = (row["layer"], row["head"]) in marked
        for name in head_columns():
            if name in row and not math.isfinite(row[name]):
                row[name] = None  # JSON has no NaN
    return rows


def show_heads(rows: Sequence[dict[str, Any]], console: Console) -> None:
    """Print heads as a table; a star marks the in-context heads."""
    known = head_columns()
    columns = {name: about for name, (_, about) in known.items() if rows and name in rows[0]}
    table = _table(console)
    for title in ("head", *(about.title for about in columns.values())):
        table.add_column(title, justify="right")
    for row in rows:
        star = "*" if row["in_context"] else " "
        values = [
            "-" if row[name] is None else format(row[name], about.format)
            for name, about in columns.items()
        ]
        table.add_row(f"{row['layer']}.{row['head']}{star}", *values)
    _print(table, console)
    if any(row["in_context"] for row in rows):
        console.print("* among the in-context heads: the largest effects on the margin")


def prompt_rows(view: PromptView, head: Head | Sequence[int]) -> list[dict[str, Any]]:
    """Return a row per token of a prompt, with all numbers of one head there."""
    values = view.of(head)
    tops = view.top_tokens.get(f"{head[0]}.{head[1]}")
    rows = []
    for i, token in enumerate(view.tokens):
        row: dict[str, Any] = {
            "position": int(view.positions[i]),
            "token": str(token),
            "role": str(view.roles[i]),
            "class": str(view.classes[i]),
            "label": str(view.label_texts[i]),
        }
        for name, array in values.items():
            if name == "label_logit":
                row[name] = {x: _number(v) for x, v in zip(view.labels, array[i], strict=True)}
            else:
                row[name] = _number(array[i])
        if tops is not None:
            row["top_token"] = str(tops[i])
        rows.append(row)
    return rows


def show_prompt(
    run: xr.DataTree, head: Head | Sequence[int], prompt: int, console: Console
) -> None:
    """Print a prompt shaded by a head's attention, and a table of its labels and named spans."""
    view = prompt_view(run, prompt)
    rows = prompt_rows(view, head)
    console.print(f"Head {head[0]}.{head[1]}, prompt {prompt}: {_answer(view)}", soft_wrap=True)
    console.print(coloured(view, head), soft_wrap=True)
    if not view.named.size:
        return
    what = "Named" if view.has_spans else "Label"
    console.print(f"\n{what} positions, of the largest attention first:")
    table = _table(console)
    names = [x for x in ("attention", "score", "score_content", "score_position") if x in rows[0]]
    table.add_column("at", justify="right")
    table.add_column("place" if view.has_spans else "label")
    if view.query_class:
        table.add_column("class")
    for name in names:
        words = {"score_content": "content", "score_position": "position"}
        table.add_column(words.get(name, name), justify="right")
    for label in view.labels:
        table.add_column(f"OV {_name(label)}", justify="right")
    if "top_token" in rows[0]:
        table.add_column("OV top token")
    for i in sorted(view.named, key=lambda i: -(rows[i].get("attention") or 0)):
        row = rows[i]
        cells = [str(row["position"]), _name(view.name_of(i))]
        if view.query_class:
            star = "*" if row["class"] == view.query_class else ""
            cells.append(_name(row["class"]) + star)
        cells += [_written(row[name]) for name in names]
        cells += [_written(row["label_logit"][label]) for label in view.labels]
        if "top_token" in row:
            cells.append(control_free(row["top_token"]))
        table.add_row(*cells)
    _print(table, console)
    if view.query_class:  # tasks of pairs have no classes
        console.print(f"* the query's class, {control_free(view.query_class)}")


def coloured(view: PromptView, head: Head | Sequence[int]) -> Text:
    """Return the prompt shaded by attention, with labels and named spans underlined.

    Without colours, as in a pipe, attention of 0.1 or more is written after its token.
    """
    from rich.text import Text

    attention = view.of(head).get("attention", np.full(len(view.tokens), np.nan))
    most = np.nanmax(attention) if np.isfinite(attention).any() else 1.0
    text = Text()
    for i, token in enumerate(view.tokens):
        share = attention[i] / most if np.isfinite(attention[i]) and most > 0 else 0.0
        style = "underline" if i in view.named else ""
        if share > 0.05:
            red, green, blue = (round(255 + (c - 255) * share) for c in (213, 94, 0))
            style += f" black on rgb({red},{green},{blue})"
        text.append(control_free(str(token), keep="\n"), style.strip())
        if attention[i] >= 0.1:
            text.append(f"[{attention[i]:.2f}]", "dim")
    return text


def _table(console: Console) -> Table:
    """Make a table; in a pipe, without lines."""
    from rich import box
    from rich.table import Table

    return Table(box=box.ROUNDED if console.is_terminal else None)


def _print(table: Table, console: Console) -> None:
    """Print a table; in a narrow terminal cells wrap, so that no number is cut."""
    from rich.measure import Measurement

    for column in table.columns:
        column.no_wrap = True
    wide = console.options.update(max_width=MOST_WIDTH)
    needed = Measurement.get(console, wide, table).maximum
    if needed <= console.width:
        console.print(table)
        return
    before, console.width = console.width, needed
    try:
        console.print(table, crop=False, soft_wrap=False)
    finally:
        console.width = before


def _answer(view: PromptView) -> str:
    right = f"{control_free(view.right)} is right"
    if not view.answer:
        return right
    answer = view.answer
    names = [control_free(label) for label in answer["labels"]]
    if answer["answers"]:
        pairs = zip(names, answer["answers"], strict=True)
        names = [f"{name} {control_free(text)!r}" for name, text in pairs]
    kind = "logprob" if answer["logit"] is None else "logit"
    values = ", ".join(
        f"{name} {value:.2f}" for name, value in zip(names, answer[kind], strict=True)
    )
    said = control_free(answer["top_token"])
    what = "log-probabilities" if kind == "logprob" else "logits"
    return f"{right}, the model says {said!r} ({what}: {values})"


def _name(text: str) -> str:
    shown = control_free(text)
    return shown if len(shown) <= MOST_NAME else shown[: MOST_NAME - 1] + "\u2026"


def _number(value: Any) -> float | None:
    return float(value) if np.isfinite(value) else None


def _written(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
