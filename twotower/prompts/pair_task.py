"""Tasks of pairs: inputs with one output each, such as countries and their capitals."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from ..checks import encodable, finite, is_list, shown, whole
from ..errors import InputError
from .bundled import bundled_pairs, bundled_tasks
from .classes import is_missing
from .tables import FORMATS, Table, read_file, read_object


@dataclass(frozen=True)
class PairTask:
    """A task of pairs (input, output).

    Parameters
    ----------
    name
        A short name, written into every result.
    pairs
        Tuples (input, output), dicts {"input": ..., "output": ...}, or one dict of input to
        output. Repeated pairs are kept once. `load_pairs` reads files and tables.
    description, source
        Description and source of the pairs.

    Raises
    ------
    InputError
        If there are fewer than two pairs, an input or output is blank or not a text, or an
        input has two outputs.

    Examples
    --------
    >>> task = PairTask("capitals", [("France", "Paris"), ("Italy", "Rome")])
    >>> task.pairs
    (('France', 'Paris'), ('Italy', 'Rome'))
    """

    name: str
    pairs: Sequence[tuple[str, str]]
    description: str = ""
    source: str = ""

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name.strip():
            raise InputError(f"the task's name {shown(self.name)} must be a text")
        for about in ("name", "description", "source"):
            if not isinstance(getattr(self, about), str):
                raise InputError(f"{about}={shown(getattr(self, about))} must be a text")
            encodable(f"the task's {about}", getattr(self, about))
        listed = self.pairs.items() if isinstance(self.pairs, Mapping) else self.pairs
        table = hasattr(listed, "columns") or hasattr(listed, "column_names")
        if table or not is_list(listed):
            raise InputError(
                f"task {self.name!r} needs a list of (input, output); read files and tables by "
                "load_pairs"
            )
        outputs: dict[str, str] = {}
        for number, pair in enumerate(listed):
            given, output = _pair(self.name, number, pair)
            if outputs.setdefault(given, output) != output:
                raise InputError(
                    f"task {self.name!r}: {given!r} has the outputs {outputs[given]!r} and "
                    f"{output!r}; keep one"
                )
        if len(outputs) < 2:
            raise InputError(f"task {self.name!r} has {len(outputs)} pair; it needs at least 2")
        object.__setattr__(self, "pairs", tuple(outputs.items()))

    def split(self, fraction: float, seed: int) -> tuple[PairTask, PairTask]:
        """Split into two tasks without common pairs.

        Parameters
        ----------
        fraction
            Share of the pairs in the first task, between 0 and 1.
        seed
            Seed of the draw.

        Raises
        ------
        InputError
            If the fraction is not between 0 and 1, or a part would have fewer than two pairs.
        """
        if not 0 < finite("fraction", fraction) < 1:
            raise InputError(f"fraction={fraction} must be strictly between 0 and 1")
        n = len(self.pairs)
        cut = round(fraction * n)
        if not 2 <= cut <= n - 2:
            raise InputError(f"{n} pairs of {self.name!r} cannot be split by {fraction}")
        order = np.random.default_rng([whole("seed", seed), 7]).permutation(n)
        first, second = (
            PairTask(
                self.name, [self.pairs[i] for i in sorted(part)], self.description, self.source
            )
            for part in (order[:cut], order[cut:])
        )
        return first, second


def load_pairs(
    source: Any, *, input: str = "input", output: str = "output", name: str | None = None
) -> PairTask:
    """Load a task of pairs by name or from a table.

    Parameters
    ----------
    source
        A bundled task ("capitals"; `bundled_pairs` lists them), a CSV, TSV, JSON, JSONL or
        Parquet file, a pandas DataFrame or a `datasets.Dataset`. JSON may be a list of objects
        {"input": ..., "output": ...}.
    input, output
        Columns of the inputs and outputs.
    name
        The task's name; by default that of the file.

    Returns
    -------
    PairTask

    Raises
    ------
    InputError
        If the task, the file or a column does not exist, or the pairs are not a valid task.
    """
    if isinstance(source, str) and source in bundled_pairs():
        path = resources.files(__package__) / "pairs" / f"{source}.json"
        task = PairTask(**json.loads(path.read_text(encoding="utf-8")))
        return task if name is None else replace(task, name=name)
    if isinstance(source, (str, Path)):
        file = Path(source)
        if source in bundled_tasks():
            raise InputError(f"{source!r} is a task of classes: use load_task({source!r})")
        if file.suffix.lower() not in FORMATS:
            raise InputError(
                f"there is no task of pairs {str(source)!r}. Bundled: "
                f"{', '.join(bundled_pairs())}. Or give a table ({', '.join(FORMATS)})"
            )
        table: Table | None = read_file(file, input, output)
    else:
        table = read_object(source, input, output, "train")
    if table is None:
        raise InputError(
            f"{type(source).__name__} is not a table; for your own pairs use PairTask(name, pairs)"
        )
    return _from_table(table, input, output, name)


def _from_table(table: Table, given: str, output: str, name: str | None) -> PairTask:
    """Return a task of pairs from the rows of a table.

    Parameters
    ----------
    table
        The table.
    given, output
        Columns of inputs and outputs.
    name
        The task's name; by default the table's.
    """
    pairs = []
    for number, row in enumerate(table.rows, start=1):
        where = f"row {number} of {table.name}"
        if not isinstance(row, dict) or given not in row or output not in row:
            has = ", ".join(map(str, row)) if isinstance(row, dict) else repr(row)
            raise InputError(
                f"{where} lacks the column {given!r} or {output!r}; it has {has}. Name the "
                "columns with input= and output="
            )
        values = [row[given], row[output]]
        for column, value in zip((given, output), values, strict=True):
            if is_missing(value) or not isinstance(value, (str, int, float)):
                raise InputError(f"{where} holds {value!r} in {column!r}, which is no text")
        pairs.append((str(values[0]), str(values[1])))
    return PairTask(table.name if name is None else name, pairs, source=table.source)


def _pair(task: str, number: int, pair: Any) -> tuple[str, str]:
    """Return a pair of texts without spaces around them."""
    if isinstance(pair, Mapping) and {"input", "output"} <= set(pair):
        pair = (pair["input"], pair["output"])
    ok = isinstance(pair, Sequence) and not isinstance(pair, str) and len(pair) == 2
    if not ok or not all(isinstance(text, str) and text.strip() for text in pair):
        raise InputError(
            f"task {task!r}: pair {number} is {pair!r}; give (input, output), two texts"
        )
    texts = [" ".join(text.split()) for text in pair]
    for text in texts:
        encodable(f"task {task!r}: pair {number}", text)
    return texts[0], texts[1]
