"""Tables: what people hold their texts and classes in, and what is wrong with it."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

import twotower as tt

FRAME = pd.DataFrame(
    {
        "id": [1, 2, 3, 4],
        "text": ["owl", "Ulm", "La  Paz,\nBolivia", "owl"],
        "label": ["pet", "town", "town", "pet"],
    }
)
TEXTS = {"pet": ("owl",), "town": ("Ulm", "La Paz, Bolivia")}


@pytest.fixture(scope="module")
def datasets() -> Any:
    library = pytest.importorskip("datasets")
    library.disable_progress_bars()
    return library


# ---- one table in every form -------------------------------------------------------

WRITE: dict[str, Callable[[Path], object]] = {
    "t.csv": lambda path: FRAME.to_csv(path, index=False),
    "index.csv": FRAME.to_csv,
    "t.TSV": lambda path: FRAME.to_csv(path, sep="\t"),
    "t.parquet": FRAME.to_parquet,
    "t.jsonl": lambda path: FRAME.to_json(path, orient="records", lines=True),
    "lines.json": lambda path: FRAME.to_json(path, orient="records", lines=True),
    "records.json": lambda path: FRAME.to_json(path, orient="records"),
    "columns.json": lambda path: FRAME.to_json(path, orient="columns"),
    "index.json": lambda path: FRAME.to_json(path, orient="index"),
    "split.json": lambda path: FRAME.to_json(path, orient="split"),
    "table.json": lambda path: FRAME.to_json(path, orient="table"),
    "lists.json": lambda path: path.write_text(json.dumps(FRAME.to_dict("list"))),
}


@pytest.mark.parametrize("name", WRITE)
def test_a_file_of_every_form(name: str, tmp_path: Path) -> None:
    WRITE[name](tmp_path / name)
    task = tt.load_task(tmp_path / name)
    assert task.texts == TEXTS
    assert task.name == Path(name).stem
    assert task.source == f"file {name}"


def test_a_data_frame() -> None:
    assert tt.load_task(FRAME).texts == TEXTS
    task = tt.load_task(FRAME.rename(columns={"text": "a", "label": "b"}), text="a", label="b")
    assert task.texts == TEXTS
    assert tt.load_task(FRAME, name="pets").name == "pets"


def test_a_dataset_and_its_splits(datasets: Any) -> None:
    table = datasets.Dataset.from_pandas(FRAME)
    assert tt.load_task(table).texts == TEXTS
    assert tt.load_task(table.with_format("numpy")).texts == TEXTS
    splits = datasets.DatasetDict(train=table.select([0, 1]), test=table.select([2, 3]))
    assert tt.load_task(splits).texts == {"pet": ("owl",), "town": ("Ulm",)}
    assert tt.load_task(splits, split="test").texts["town"] == ("La Paz, Bolivia",)
    with pytest.raises(tt.errors.InputError, match="no split 'dev'; it has train, test"):
        tt.load_task(splits, split="dev")
    with pytest.raises(tt.errors.InputError, match="streaming dataset has no end"):
        tt.load_task(table.to_iterable_dataset())


def test_classes_by_number_have_their_names(datasets: Any, tmp_path: Path) -> None:
    kinds = datasets.ClassLabel(names=["town", "pet"])
    features = datasets.Features({"text": datasets.Value("string"), "label": kinds})
    table = datasets.Dataset.from_dict({"text": ["owl", "Ulm"], "label": [1, 0]}, features)
    table.to_parquet(str(tmp_path / "t.parquet"))
    for source in (table, tmp_path / "t.parquet"):
        assert tt.load_task(source).texts == {"pet": ("owl",), "town": ("Ulm",)}
    unlabelled = datasets.Dataset.from_dict({"text": ["owl", "Ulm"], "label": [1, -1]}, features)
    with pytest.raises(tt.errors.InputError, match="row 2 of dataset has no class"):
        tt.load_task(unlabelled)


# ---- columns of any type -----------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "names"),
    [
        ([0, 1], "0 1"),
        ([0.0, 1.0], "0 1"),
        ([0.5, 1.0], "0.5 1"),
        ([True, False], "True False"),
        (pd.Categorical(["x", "y"]), "x y"),
        (pd.array([3, 4], dtype="Int64"), "3 4"),
        (pd.array(["x", "y"], dtype="string"), "x y"),
        (np.array([7, 8], dtype=np.int8), "7 8"),
        (np.array(["x", "y"], dtype=object), "x y"),
        ([np.float32(2), "2 "], "2"),
        (["x ", "\tx"], "x"),
    ],
)
def test_classes_of_any_type(values: Any, names: str) -> None:
    frame = pd.DataFrame({"text": ["owl", "Ulm", "x"], "label": [*values, "z"]})
    if not isinstance(values, list):
        frame = pd.DataFrame({"text": ["owl", "Ulm"], "label": values})
        assert tt.load_task(frame).texts == dict(
            zip(names.split(), (("owl",), ("Ulm",)), strict=True)
        )
    else:
        assert set(tt.load_task(frame).texts) == {*names.split(), "z"}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (["x", None], "row 2 of table has no class in the column 'label'"),
        ([np.nan, "x"], "row 1 of table has no class"),
        ([1.0, np.nan], "row 2 of table has no class"),
        (pd.array([1, None], dtype="Int64"), "row 2 of table has no class"),
        (pd.Categorical(["x", None]), "row 2 of table has no class"),
        (pd.to_datetime(["2020-01-01", None]), "row 2 of table has no class"),
        (["x", " "], "row 2 of table has no class"),
        (["x", ["y"]], r"row 2 of table holds \['y'\] in 'label', which names no class"),
        (["x", b"y"], "row 2 of table holds b'y' in 'label'"),
    ],
)
def test_rows_without_a_class(values: Any, message: str) -> None:
    with pytest.raises(tt.errors.InputError, match=message):
        tt.load_task(pd.DataFrame({"text": ["owl", "Ulm"], "label": values}))


@pytest.mark.parametrize("missing", [None, np.nan, pd.NA, "", "  "])
def test_rows_without_a_text(missing: Any) -> None:
    frame = pd.DataFrame({"text": ["owl", missing], "label": ["x", "y"]}, dtype=object)
    with pytest.raises(
        tt.errors.InputError, match="row 2 of table: class 'y' holds '', which is no text"
    ):
        tt.load_task(frame)


def test_numbers_of_a_csv_are_whole_where_pandas_made_them_decimals(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("text,label\na,1.0\nb,0.0\nc,1\n")
    assert tt.load_task(tmp_path / "t.csv").texts == {"0": ("b",), "1": ("a", "c")}
    (tmp_path / "t.csv").write_text("text,label\na,1.0\nb,v2.0\nc,007\n")
    assert set(tt.load_task(tmp_path / "t.csv").texts) == {"1.0", "v2.0", "007"}
    (tmp_path / "t.csv").write_text("text,label\na,1.10\nb,1.9\nc,2.0\n")
    assert set(tt.load_task(tmp_path / "t.csv").texts) == {"1.10", "1.9", "2.0"}


def test_columns_that_are_not_there_or_twice() -> None:
    with pytest.raises(
        tt.errors.InputError, match="the table has no column 'label'; it has id, text, k"
    ):
        tt.load_task(FRAME.rename(columns={"label": "k"}))
    with pytest.raises(
        tt.errors.InputError, match="the table has several columns 'text'; keep one"
    ):
        tt.load_task(FRAME.rename(columns={"id": "text"}))
    with pytest.raises(tt.errors.InputError, match="the table holds no rows"):
        tt.load_task(FRAME[:0])


# ---- files that are not what they seem ---------------------------------------------

BAD = {
    "a comma in a text": ("t.csv", "text,label\na,b,x\nc,y\n", "line 2: .* this row has 3"),
    "a field too few": ("t.csv", "text,label\na,x\nb\nc,y\n", "line 3: .* this row has 1"),
    "after a text of two lines": ("t.csv", 'text,label\n"a\nb",x\nc,d,y\n', "line 4: .* has 3"),
    "after an empty line": ("t.csv", "text,label\n\na,x\n\nb,c,y\n", "line 5: .* has 3"),
    "a tab in a text": ("t.tsv", "text\tlabel\na\tb\tx\n", "line 2: .*with tabs in quotes"),
    "an open quote": ("t.csv", 'text,label\n"a,x\nb,y\n', "line 2: unexpected end of data"),
    "text after a quote": ("t.csv", 'text,label\n"a" b,x\n', "line 2: ',' expected after"),
    "semicolons": ("t.csv", "text;label\na;x\n", "separated by semicolons, not by commas; save"),
    "bars": ("t.csv", "id|text|label\n1|a|x\n", "separated by bars, not by commas"),
    "tabs in a csv": ("t.csv", "text\tlabel\na\tx\n", "by tabs, not by commas; call it .tsv"),
    "commas in a tsv": ("t.tsv", "text,label\na,x\n", "by commas, not by tabs; call it .csv"),
    "a name twice": ("t.csv", "text,text,label\na,b,x\n", "several columns 'text'; keep one"),
    "another name twice": ("t.csv", "text,label,k,k\na,x,1,2\n", "several columns 'k'"),
    "latin-1": ("t.csv", "text,label\na,x\ncafé,x\n".encode("latin-1"), "line 3, byte 0xe9"),
    "utf-16": ("t.csv", "text,label\na,x\n".encode("utf-16"), "not utf-8 but UTF-16; save it"),
    "utf-16 unmarked": ("t.csv", "text,label\na,x\n".encode("utf-16-le"), "it is not utf-8 text"),
    "utf-16 JSON": ("t.json", "[]".encode("utf-16"), "not utf-8 but UTF-16"),
    "no JSON": ("t.json", "[\n{nope}]", "t.json, line 2: Expecting property name"),
    "empty JSON": ("t.json", "", "holds no rows"),
    "a key twice": ("t.json", '[{"text": "a", "label": "x", "label": "y"}]', "key 'label' twice"),
    "in a line": ("t.jsonl", '{"text": "a", "text": "b", "label": "x"}', "the key 'text' twice"),
    "a number": ("t.json", "3", "must be a list of objects"),
    "a list of texts": ("t.json", '["a", "b"]', "row 1 of t lacks .* it has 'a'"),
    "other columns": ("t.json", '{"a": [1]}', "no column 'text'; it has a"),
    "columns of two lengths": ("t.json", '{"text": ["a"], "label": []}', "different lengths"),
    "columns of two rows": ("t.json", '{"text": {"0": "a"}, "label": {"1": "x"}}', "different le"),
    "a text for a column": ("t.json", '{"text": "a", "label": "x"}', "columns must be lists"),
    "a short row": ("t.json", '{"columns": ["text", "label"], "data": [["a"]]}', "row 1 does not"),
    "broken lines": ("t.json", '{"text": "a", "label": "x"}\n{"text"', "t.json, line 2: Expecting"),
    "no Parquet": ("t.parquet", "text,label\na,x\n", "t.parquet cannot be read: Parquet magic"),
    "a spreadsheet": ("t.xlsx", "PK", "is not a readable table; give one of .csv, .tsv"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_files_that_are_not_what_they_seem(case: str, tmp_path: Path) -> None:
    name, content, message = BAD[case]
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(tt.errors.InputError, match=message) as caught:
        tt.load_task(path)
    assert "\n" not in str(caught.value)


def test_parquet_says_what_it_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    FRAME.drop(columns="label").to_parquet(tmp_path / "t.parquet")
    with pytest.raises(
        tt.errors.InputError, match="t.parquet has no column 'label'; it has id, text"
    ):
        tt.load_task(tmp_path / "t.parquet")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(
        tt.errors.InputError, match=r"needs the package pyarrow.*'twotower\[tables\]'"
    ):
        tt.load_task(tmp_path / "t.parquet")


def test_tables_are_told_without_importing_their_libraries(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("pandas", "datasets"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    with pytest.raises(tt.errors.InputError, match="dict is neither a task name nor a table"):
        tt.load_task({"text": ["a long list of texts"] * 9, "label": ["x"] * 9})
    assert not {"pandas", "datasets"} & set(sys.modules)


# ---- a Task from other forms -------------------------------------------------------

GROUPED = FRAME.groupby("label")["text"]
FORMS: dict[str, Any] = {
    "a dict of Series": {name: group["text"] for name, group in FRAME.groupby("label")},
    "a Series of lists": GROUPED.apply(list),
    "a grouped Series": GROUPED,
    "a Series of texts": FRAME.set_index("label")["text"],
    "tuples": list(FRAME[["text", "label"]].itertuples(index=False, name=None)),
    "named tuples": FRAME[["text", "label"]].itertuples(index=False),
    "a zip": zip(FRAME["text"], FRAME["label"], strict=True),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_task_of_other_forms(form: str) -> None:
    task = tt.Task("t", FORMS[form])
    assert task.texts == {"pet": ("owl",), "town": ("Ulm", "La  Paz,\nBolivia")}


def test_classes_that_are_numbers_become_texts() -> None:
    assert tt.Task("t", {0: ["a"], np.int64(1): ["b"], 2.0: ["c"]}).classes == ("0", "1", "2")
    assert tt.Task("t", [("a", 1), ("b", 0), ("c", 1.0)]).texts == {"1": ("a", "c"), "0": ("b",)}


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (FRAME, "for a DataFrame use load_task"),
        ({"a": FRAME, "b": ["x"]}, "class 'a' needs a list of texts"),
        ({"a": ["x"], "a ": ["y"]}, "class 'a ' needs a different name; another class is also 'a'"),
        ({1: ["x"], 1.5: ["y"], "1": ["z"]}, "class '1' needs a different name"),
        ({None: ["x"], "b": ["y"]}, "class None needs a name"),
        ({np.nan: ["x"], "b": ["y"]}, "class nan needs a name"),
        ([("a", "x"), ("b", None)], "class of text 2, None, needs a name"),
        ([("a", "x"), ("b",)], "must be a dict .* or a list of tuples"),
        # Two lists of two texts could be a list by class as well as pairs.
        ([["cat", "dog"], ["Paris", "Rome"]], "must be a dict .* or a list of tuples"),
        ([], "must be a dict"),
        ({"a": [np.nan], "b": ["y"]}, "class 'a' holds nan, which is no text"),
    ],
)
def test_forms_that_are_no_task(texts: Any, message: str) -> None:
    with pytest.raises(tt.errors.InputError, match=message):
        tt.Task("t", texts)
