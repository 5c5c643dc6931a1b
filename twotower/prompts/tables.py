"""Read tables of texts and classes from files, data frames and datasets.

Nothing is guessed. A file that is not rectangular, or does not have the encoding or format of its
extension, is rejected with the line of the error.
"""

from __future__ import annotations

import csv
import io
import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import InputError

Rows = list[dict[str, Any]]
"""Rows of a table, by column."""

WHOLE = re.compile(r"[+-]?\d+(\.0)?")
SEPARATED = (".csv", ".tsv")
SEPARATORS = {",": "commas", "\t": "tabs", ";": "semicolons", "|": "bars"}


@dataclass(frozen=True)
class Table:
    """Rows of a table and their source.

    Attributes
    ----------
    rows
        The rows, each a dict by column.
    name
        Name of the file or dataset, used as the task's name.
    source
        Source of the rows, for the provenance.
    """

    rows: Rows
    name: str
    source: str


def read_file(path: Path, text: str, label: str) -> Table:
    """Read a file; its extension gives the format (see `FORMATS`).

    Parameters
    ----------
    path
        The file.
    text, label
        Columns of the texts and the classes; other columns may be skipped.

    Raises
    ------
    InputError
        If the file does not exist, cannot be read, is not rectangular, has no rows, or lacks
        a column.
    """
    if not path.is_file():
        raise InputError(f"there is no file {path}")
    try:
        rows = FORMATS[path.suffix.lower()](path, (text, label))
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from error
    if not rows:
        raise InputError(f"{path} holds no rows")
    return Table(rows, path.stem, f"file {path.name}")


def read_object(source: Any, text: str, label: str, split: str) -> Table | None:
    """Read a pandas DataFrame or a `datasets.Dataset`; return None for anything else.

    Neither library is imported: the user's object exists only if its library is loaded.

    Parameters
    ----------
    source
        A DataFrame, a Dataset, or a DatasetDict.
    text, label
        Columns of the texts and the classes.
    split
        Split of a DatasetDict.

    Raises
    ------
    InputError
        If a column or the split is missing, or there are no rows.
    """
    pandas, datasets = sys.modules.get("pandas"), sys.modules.get("datasets")
    if pandas is not None and isinstance(source, pandas.DataFrame):
        _check_columns("the table", list(source.columns), (text, label))
        columns = {name: source[name].tolist() for name in (text, label)}
        return Table(_transposed("the table", columns), "table", "DataFrame")
    if datasets is None:
        return None
    if isinstance(source, (datasets.IterableDatasetDict, datasets.DatasetDict)):
        if split not in source:
            raise InputError(f"the dataset has no split {split!r}; it has {', '.join(source)}")
        source = source[split]
    if isinstance(source, datasets.IterableDataset):
        raise InputError(
            "a streaming dataset has no end; load it without streaming=True, or take some rows: "
            "datasets.Dataset.from_list(list(dataset.take(1000)))"
        )
    if isinstance(source, datasets.Dataset):
        return Table(dataset_rows(source, text, label), "dataset", "Dataset")
    return None


def dataset_rows(dataset: Any, text: str, label: str, what: str = "the dataset") -> Rows:
    """Read a `datasets.Dataset`; classes by name, None for rows without a class."""
    _check_columns(what, dataset.column_names, (text, label))
    plain = dataset.with_format(None)
    names = getattr(dataset.features[label], "names", None)
    classes = [_of_names(value, names) for value in plain[label]]
    return _transposed(what, {text: list(plain[text]), label: classes})


def _of_names(value: Any, names: Sequence[str] | None) -> Any:
    """Return the name of a class from its number; None for -1, a row without a class."""
    if names is None or not isinstance(value, int):
        return value
    return names[value] if 0 <= value < len(names) else None


def _transposed(what: str, columns: Mapping[str, Sequence[Any]]) -> Rows:
    lengths = {len(values) for values in columns.values()}
    if len(lengths) > 1:
        raise InputError(f"{what} has columns of different lengths")
    if lengths == {0}:
        raise InputError(f"{what} holds no rows")
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def _check_columns(what: str, columns: Sequence[Any], wanted: Sequence[str]) -> None:
    """Check that a table has each wanted column exactly once."""
    for name in wanted:
        if name not in columns:
            raise InputError(
                f"{what} has no column {name!r}; it has {', '.join(map(str, columns))}. Name the "
                "columns with text= and label=, those of pairs with input= and output= (of a run "
                "with --text-column, --label-column, --input-column and --output-column)"
            )
        if list(columns).count(name) > 1:
            raise InputError(f"{what} has several columns {name!r}; keep one")


# ---- text files --------------------------------------------------------------------


def _decoded(path: Path) -> str:
    """Return the text of a UTF-8 file."""
    content = path.read_bytes()
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise InputError(f"{path} cannot be read: it is not utf-8 but UTF-16; save it as UTF-8")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise InputError(
            f"{path} cannot be read: it is not utf-8 (line {line}, byte 0x"
            f"{content[error.start]:02x}); save it as UTF-8"
        ) from None
    if "\0" in text.partition("\n")[0]:
        raise InputError(f"{path} cannot be read: it is not utf-8 text; save it as UTF-8")
    return text


def _separated(separator: str) -> Callable[[Path, Sequence[str]], Rows]:
    def read(path: Path, wanted: Sequence[str]) -> Rows:
        # Strict: an unclosed quote would swallow the rest of the file.
        reader = csv.reader(
            io.StringIO(_decoded(path), newline=""), delimiter=separator, strict=True
        )
        rows: Rows = []
        header: list[str] = []
        line = 1
        try:
            for fields in reader:
                start, line = line, reader.line_num + 1
                if not fields:
                    continue
                if not header:
                    header = [name.strip() for name in fields]
                    _check_header(path, header, wanted, separator)
                elif len(fields) != len(header):
                    raise InputError(
                        f"{path}, line {start}: the header names {len(header)} columns and this "
                        f"row has {len(fields)}; put texts with {SEPARATORS[separator]} in quotes"
                    )
                else:
                    rows.append(dict(zip(header, fields, strict=True)))
        except csv.Error as error:
            raise InputError(f"{path} cannot be read: line {line}: {error}") from error
        return rows

    return read


def _check_header(path: Path, header: list[str], wanted: Sequence[str], separator: str) -> None:
    twice = [name for name, count in Counter(filter(None, header)).items() if count > 1]
    if twice:
        raise InputError(f"{path} has several columns {twice[0]!r}; keep one, or rename them")
    for other, name in SEPARATORS.items():
        fields = [field.strip() for field in separator.join(header).split(other)]
        missing = not set(wanted) <= set(header)
        if missing and other != separator and set(wanted) <= set(fields):
            ending = ".tsv" if other == "\t" else ".csv"
            better = f"call it {ending}" if other in "\t," else "save it with commas"
            raise InputError(
                f"{path} is separated by {name}, not by {SEPARATORS[separator]}; {better}"
            )
    if any(header):
        _check_columns(str(path), header, wanted)


def whole_classes(table: Table, label: str) -> Table:
    """Remove the ".0" of whole classes, which pandas writes if a cell of the column is empty.

    Other decimals, such as versions, stay.
    """
    texts = [row[label].strip() for row in table.rows]
    if not all(WHOLE.fullmatch(text) for text in texts if text):
        return table
    pairs = zip(table.rows, texts, strict=True)
    return replace(table, rows=[{**row, label: text.removesuffix(".0")} for row, text in pairs])


def _loaded(where: str, text: str) -> Any:
    """Return the value of a JSON text, whose objects may not have a key twice."""

    def checked(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise InputError(f"{where}: an object has the key {twice!r} twice; keep one")
        return found

    return json.loads(text, object_pairs_hook=checked)


def _json_lines(path: Path, wanted: Sequence[str]) -> Rows:
    return _parsed_lines(path, _decoded(path))


def _parsed_lines(path: Path, text: str) -> Rows:
    rows: Rows = []
    # Not splitlines(), which also splits at Unicode line separators.
    for number, line in enumerate(io.StringIO(text), start=1):
        try:
            rows += [_loaded(f"{path}, line {number}", line)] if line.strip() else []
        except json.JSONDecodeError as error:
            raise InputError(f"{path}, line {number}: {error.msg}") from error
    return rows


def _json(path: Path, wanted: Sequence[str]) -> Rows:
    """Read JSON: a list of objects, or an object in a format of pandas."""
    text = _decoded(path)
    try:
        found = _loaded(str(path), text) if text.strip() else []
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":  # one line per row
            return _parsed_lines(path, text)
        raise InputError(f"{path}, line {error.lineno}: {error.msg}") from error
    if isinstance(found, dict):
        return _json_object(path, found, wanted)
    if not isinstance(found, list):
        raise InputError(f"{path} must be a list of objects, one per text")
    return found


def _json_object(path: Path, found: dict[str, Any], wanted: Sequence[str]) -> Rows:
    data = found.get("data")
    if isinstance(data, list) and "columns" in found:  # orient="split"
        names = found["columns"]
        bad = next((i for i, row in enumerate(data, start=1) if len(row) != len(names)), None)
        if bad is not None:
            raise InputError(f"{path}: row {bad} does not have {len(names)} values")
        _check_columns(str(path), names, wanted)
        return [dict(zip(names, row, strict=True)) for row in data]
    if isinstance(data, list) and not set(wanted) <= set(found):  # orient="table"
        return data
    values = list(found.values())
    by_row = bool(values) and all(isinstance(v, dict) and set(wanted) <= set(v) for v in values)
    if by_row:  # orient="index"
        return values
    _check_columns(str(path), list(found), wanted)
    columns = {name: found[name] for name in wanted}
    if all(isinstance(column, dict) for column in columns.values()):  # orient="columns"
        keys = [list(column) for column in columns.values()]
        if keys[0] != keys[1]:
            raise InputError(f"{path} has columns of different lengths")
        columns = {name: list(column.values()) for name, column in columns.items()}
    if not all(isinstance(column, list) for column in columns.values()):
        raise InputError(f"{path}: the columns must be lists, or objects of row to value")
    return _transposed(str(path), columns)


# ---- Parquet -----------------------------------------------------------------------


def _parquet(path: Path, wanted: Sequence[str]) -> Rows:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise InputError(
            f"{path} is Parquet, which needs the package pyarrow: pip install 'twotower[tables]'"
        ) from error
    try:
        with parquet.ParquetFile(path) as file:
            schema = file.schema_arrow
            _check_columns(str(path), schema.names, wanted)
            table = file.read(columns=list(wanted))
    except ArrowException as error:
        raise InputError(f"{path} cannot be read: {' '.join(str(error).split())[:200]}") from error
    text, label = wanted
    names = _names_in(schema.metadata or {}, label)
    classes = [_of_names(value, names) for value in table[label].to_pylist()]
    return _transposed(str(path), {text: table[text].to_pylist(), label: classes})


def _names_in(metadata: Mapping[bytes, bytes], label: str) -> list[str] | None:
    """Return the class names that `datasets` writes to the metadata of a Parquet file."""
    about = json.loads(metadata.get(b"huggingface", b"{}"))
    names: list[str] | None = about.get("info", {}).get("features", {}).get(label, {}).get("names")
    return names


FORMATS: dict[str, Callable[[Path, Sequence[str]], Rows]] = {
    ".csv": _separated(","),
    ".tsv": _separated("\t"),
    ".json": _json,
    ".jsonl": _json_lines,
    ".parquet": _parquet,
}
"""Reader of each file format, by extension."""
