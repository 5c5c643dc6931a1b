"""Read class names, and texts by class, from common Python and pandas types."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from ..checks import is_list
from ..errors import InputError

MISSING = ("NAType", "NaTType")
"""Types of missing values in pandas."""


def is_missing(value: Any) -> bool:
    """Check whether a table cell is missing: None, NaN, or missing in pandas."""
    if value is None or type(value).__name__ in MISSING:
        return True
    return isinstance(value, (float, np.floating)) and bool(np.isnan(value))


def class_name(value: Any) -> str | None:
    """Return the name of a class as text; None if the value cannot name a class.

    Parameters
    ----------
    value
        A text, a number (1 and 1.0 are the same class), True or False, or another scalar with
        a text form, such as a date.
    """
    if isinstance(value, np.generic):
        value = value.item()
    if is_missing(value) or isinstance(value, (bytes, Mapping)):
        return None
    if str(value) == object.__repr__(value):
        return None  # a memory address is no name
    if isinstance(value, str):
        return str(value).strip() or None
    if isinstance(value, Iterable):
        return None
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        value = int(value)
    return str(value).strip() or None


def texts_by_class(texts: Any) -> list[tuple[Any, Any]]:
    """Return pairs of (class, its texts), unchecked.

    Parameters
    ----------
    texts
        A dict of class to texts; a pandas Series with classes as index (of lists or of single
        texts), or grouped by class; or (text, class) tuples.

    Raises
    ------
    InputError
        If it is of another type.
    """
    kind = type(texts).__name__
    if kind in ("DataFrame", "Dataset", "DatasetDict"):
        raise InputError(
            f"texts must be a dict of class name to texts; for a {kind} use "
            "load_task(table, text=..., label=...)"
        )
    if isinstance(texts, Mapping):
        return list(texts.items())
    if kind == "SeriesGroupBy":
        return list(texts)
    if kind == "Series":
        rows = list(texts.items())
        single = all(isinstance(text, str) for _, text in rows)
        return _grouped([(text, cls) for cls, text in rows]) if single else rows
    pairs = list(texts) if is_list(texts) else []
    if not all(isinstance(pair, tuple) and len(pair) == 2 for pair in pairs) or not pairs:
        raise InputError(
            "texts must be a dict of class name to texts, or a list of tuples (text, class)"
        )
    return _grouped(pairs)


def _grouped(pairs: Iterable[tuple[Any, Any]]) -> list[tuple[Any, Any]]:
    """Group pairs of (text, class) into pairs of (class, texts)."""
    found: dict[Any, list[Any]] = {}
    for number, (text, cls) in enumerate(pairs, start=1):
        name = class_name(cls)
        if name is None:
            raise InputError(f"the class of text {number}, {cls!r}, needs a name")
        found.setdefault(name, []).append(text)
    return list(found.items())
