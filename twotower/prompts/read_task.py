"""Read a task of classes or of pairs, whichever a name or a file stands for."""

from __future__ import annotations

from pathlib import Path

from ..errors import InputError
from .bundled import bundled_pairs
from .pair_task import PairTask, load_pairs
from .tables import FORMATS, read_file
from .task import Task, load_task


def read_task(
    source: str,
    *,
    text: str = "text",
    label: str = "label",
    input: str = "input",
    output: str = "output",
) -> Task | PairTask:
    """Return a task of classes or of pairs.

    Parameters
    ----------
    source
        As for `load_task`, or for `load_pairs` a bundled name or a file. A file holds pairs if it
        has the columns of pairs and not those of classes.
    text, label
        Columns of the texts and the classes.
    input, output
        Columns of the inputs and outputs of pairs.

    Raises
    ------
    InputError
        As `load_task` and `load_pairs`.
    """
    if source in bundled_pairs():
        return load_pairs(source)
    path = Path(source)
    table = path.suffix.lower() in FORMATS and path.is_file()
    if table and _lacks(path, text, label) and not _lacks(path, input, output):
        return load_pairs(path, input=input, output=output)
    return load_task(source, text=text, label=label)


def _lacks(path: Path, first: str, second: str) -> bool:
    """Return whether a file lacks one of two columns. Other faults are reported by its reader."""
    try:
        rows = read_file(path, first, second).rows
    except InputError as error:
        return "has no column" in str(error)
    return isinstance(rows[0], dict) and not {first, second} <= set(rows[0])
