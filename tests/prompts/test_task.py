"""Tasks: from dicts, from files, from the package, and from the hub."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
from tiny import byte_level

import twotower as tt
from twotower.prompts.task import HUB_TASKS

# ---- from a dict -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ([["cat"], ["Rome"]], "texts must be a dict of class name to texts"),
        ({}, "has 0 class; it needs at least 2"),
        ({"a": ["cat"]}, "has 1 class; it needs at least 2"),
        ({"a": ["cat"], "b": []}, "class 'b' has no texts"),
        ({"a": ["cat"], "b": "Rome"}, "class 'b' needs a list of texts"),
        ({"a": ["cat"], "b": 5}, "class 'b' needs a list of texts"),
        ({"a": ["cat"], "b": ["Rome", " \t"]}, r"class 'b' holds ' \\t', which is no text"),
        ({"a": ["cat"], "b": [""]}, "class 'b' holds '', which is no text"),
        ({"a": ["cat"], "b": [None]}, "class 'b' holds None, which is no text"),
        ({"a": ["cat"], "b": [["Rome"]]}, r"class 'b' holds \['Rome'\], which is no text"),
        ({"a": ["cat", "dog"], "b": ["dog"]}, "'dog' is in the classes 'a' and 'b'"),
    ],
)
def test_what_is_no_task(texts: Any, message: str) -> None:
    with pytest.raises(tt.errors.InputError, match=f"^task 't'.*{message}"):
        tt.Task("t", texts)


def test_texts_are_kept_once_and_in_order() -> None:
    given = MappingProxyType({"b": ["y", "x", "y"], "a": (t for t in "qpq")})
    task = tt.Task("t", given)
    assert task.texts == {"b": ("y", "x"), "a": ("q", "p")}
    assert task.classes == ("b", "a")


def test_parts_of_a_task() -> None:
    about = {"description": "d", "kind": "words", "hard": True, "source": "s"}
    task = tt.Task(
        "t", {"a": [f"a{i}" for i in range(10)], "b": [f"b{i}" for i in range(5)]}, **about
    )
    first, second = task.split(0.4, seed=1)
    assert {c: len(x) for c, x in first.texts.items()} == {"a": 4, "b": 2}
    for name, texts in task.texts.items():
        assert sorted(first.texts[name] + second.texts[name]) == sorted(texts)
    for part in (first, second):
        assert part.name == "t"
        assert {name: getattr(part, name) for name in about} == about
    assert task.split(0.4, seed=1)[0] == first
    assert any(task.split(0.4, seed=s)[0] != first for s in (2, 3))
    # A part always keeps a text of each class.
    assert [len(p.texts["b"]) for p in task.split(0.01, seed=0)] == [1, 4]
    assert [len(p.texts["b"]) for p in task.split(0.99, seed=0)] == [4, 1]
    with pytest.raises(
        tt.errors.InputError, match="class 'b' of 'u' has one text; a split needs two"
    ):
        tt.Task("u", {"a": ["x", "y"], "b": ["z"]}).split(0.5, seed=0)


# ---- from the package --------------------------------------------------------------


def test_there_are_tasks_of_words_and_of_sentences() -> None:
    tasks = [tt.load_task(name) for name in tt.prompts.bundled_tasks()]
    kinds = [task.kind for task in tasks]
    assert kinds.count("words") >= 3
    assert kinds.count("sentences") >= 4
    assert {len(task.classes) for task in tasks} >= {2, 3, 4, 6}


@pytest.mark.parametrize("name", tt.prompts.bundled_tasks())
def test_bundled_tasks_are_sound(name: str) -> None:
    task = tt.load_task(name)
    assert task.name == name
    assert task.kind in ("words", "sentences")
    assert task.description
    assert task.source
    assert 2 <= len(task.classes) <= 6
    written = json.loads(
        (Path(tt.__file__).parent / "prompts" / "tasks" / f"{name}.json").read_text("utf-8")
    )
    for cls, texts in task.texts.items():
        assert len(texts) >= 40, cls
        assert list(texts) == written["texts"][cls], "a text is written twice"
        for text in texts:
            assert text == " ".join(text.split())
            assert ":" not in text
            assert len(text.split()) <= (2 if task.kind == "words" else 25)
    # Also where one only differs in case.
    folded = [text.casefold() for texts in task.texts.values() for text in texts]
    assert len(set(folded)) == len(folded)


# ---- from a file -------------------------------------------------------------------


def test_a_csv_file(tmp_path: Path) -> None:
    path = tmp_path / "pets.csv"
    path.write_text('id,text,label\n1,cat,pet\n2,"La  Paz,\nBolivia",town\n3,cat,pet\n', "utf-8")
    task = tt.load_task(str(path))
    # A text stands on one line of a prompt.
    assert task.texts == {"pet": ("cat",), "town": ("La Paz, Bolivia",)}
    assert task.name == "pets"
    assert task.kind == "sentences"  # three words
    assert task.source == "file pets.csv"


def test_a_byte_order_mark_and_windows_lines(tmp_path: Path) -> None:
    path = tmp_path / "pets.CSV"
    path.write_bytes("text,label\r\nZürich,town\r\nchât,pet\r\n".encode("utf-8-sig"))
    task = tt.load_task(str(path))
    assert task.texts == {"pet": ("chât",), "town": ("Zürich",)}
    assert task.kind == "words"


def test_a_jsonl_file_with_other_columns(tmp_path: Path) -> None:
    path = tmp_path / "pets.jsonl"
    rows = [{"what": "owl", "kind": 1}, {"what": "Lima", "kind": 0}, {"what": "Ulm", "kind": 0}]
    path.write_bytes("\n\n".join(map(json.dumps, rows)).encode("utf-8-sig"))
    task = tt.load_task(str(path), text="what", label="kind")
    assert task.texts == {"0": ("Lima", "Ulm"), "1": ("owl",)}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.csv", b"", "t.csv holds no rows"),
        ("t.csv", b"text,label\n", "t.csv holds no rows"),
        ("t.jsonl", b"\n \n", "t.jsonl holds no rows"),
        ("t.csv", b"word,label\ncat,pet\n", "t.csv has no column 'text'; it has word, label. "
         "Name the columns with text= and label="),
        ("t.jsonl", b'{"text": "cat", "label": "a"}\n{"text": "x"}', "row 2 of t lacks .*has text"),
        ("t.jsonl", b'["cat", "a"]', r"row 1 of t lacks the column .*it has \['cat', 'a'\]"),
        ("t.jsonl", b'{"text": "cat"', "t.jsonl, line 1: Expecting"),
        ("t.csv", b"text,label\n\xff\xfe,pet\n", "t.csv cannot be read: .*utf-8"),
        ("t.csv", b"text,label\ncat,pet\ndog\n", "t.csv, line 3: .* 2 columns and this row has 1"),
        ("t.csv", b"text,label\ncat,\n", "row 1 of t has no class in the column 'label'"),
        ("t.jsonl", b'{"text": "cat", "label": null}', "row 1 of t has no class"),
        ("t.csv", b"text,label\ncat,pet\n,town\n", "class 'town' holds '', which is no text"),
        ("t.csv", b"text,label\ncat,pet\ndog,pet\n", "has 1 class; it needs at least 2"),
        ("t.csv", b"text,label\ncat,pet\ncat,town\n", "'cat' is in the classes 'pet'"),
    ],
)  # fmt: skip
def test_files_that_hold_no_task(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(tt.errors.InputError, match=message):
        tt.load_task(str(tmp_path / name))


def test_names_that_are_no_task(tmp_path: Path) -> None:
    with pytest.raises(tt.errors.InputError, match=r"there is no file .*none\.csv"):
        tt.load_task(str(tmp_path / "none.csv"))
    with pytest.raises(
        tt.errors.InputError, match=r"no task 'nonsense'.*animals-cities.*sst2.*hub:owner"
    ):
        tt.load_task("nonsense")


# ---- from the hub ------------------------------------------------------------------


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The package datasets, with a cache of its own and without network or bars."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    yield datasets
    datasets.enable_progress_bars()


@pytest.fixture
def folder(tmp_path: Path, library: Any) -> str:
    """A dataset in the hub's form: classes by number, unlabelled and unclear rows."""
    features = {"words": library.Value("string"), "kind": library.ClassLabel(names=["pet", "town"])}
    words = [f"owl {i}" for i in range(30)] + [f"Ulm {i}" for i in range(30)]
    kinds = [0] * 30 + [1] * 30
    words += ["two\nlines", "nobody knows", "  ", None, "both", "both", "owl 0"]
    kinds += [0, -1, 0, 1, 0, 1, 0]
    table = library.Dataset.from_dict({"words": words, "kind": kinds}, library.Features(features))
    (tmp_path / "own").mkdir()
    table.to_parquet(str(tmp_path / "own" / "train.parquet"))
    table.select(range(25, 35)).to_parquet(str(tmp_path / "own" / "test.parquet"))
    return str(tmp_path / "own")


def test_a_folder_that_datasets_reads(folder: str) -> None:
    task = tt.load_task(f"hub:{folder}", text="words", label="kind")
    assert task.name == "own"
    assert task.classes == ("pet", "town")
    assert set(task.texts["pet"]) - {"both"} == {*(f"owl {i}" for i in range(30)), "two lines"}
    assert set(task.texts["town"]) - {"both"} == {f"Ulm {i}" for i in range(30)}
    assert task.kind == "words"
    assert task.source == f"hub {folder}, split train"


def test_splits_of_a_dataset(folder: str) -> None:
    task = tt.load_task(f"hub:{folder}/", text="words", label="kind", split="test")
    assert task.name == "own"
    assert sorted(task.texts["pet"]) == [f"owl {i}" for i in range(25, 30)]
    assert task.source.endswith("split test")


def test_some_texts_of_each_class_drawn_by_seed(folder: str) -> None:
    def draw(seed: int) -> tt.Task:
        return tt.load_task(
            f"hub:{folder}", text="words", label="kind", split="test", max_per_class=3, seed=seed
        )

    assert [len(texts) for texts in draw(0).texts.values()] == [3, 3]
    assert draw(0) == draw(0)
    assert any(draw(0) != draw(seed) for seed in (1, 2))


def test_a_task_of_the_hub_makes_prompts(folder: str, llama: tt.Model) -> None:
    task = tt.load_task(f"hub:{folder}", text="words", label="kind", max_per_class=9)
    prompts = tt.build_prompts(llama, task, shots=2, n=2)
    assert prompts.task_name == "own"
    assert {prompts.tokenizer.decode(i) for i in prompts.label_ids} == {" foo", " bar"}
    assert prompts.tokenizer is byte_level()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"text": "sentence"}, "has no column 'sentence'; it has words, kind"),
        ({"label": "topic"}, "has no column 'topic'; it has words, kind"),
        ({"split": "validation"}, 'Unknown split "validation"'),
    ],
)
def test_columns_and_splits_that_are_not_there(
    folder: str, options: dict[str, str], message: str
) -> None:
    with pytest.raises(tt.errors.InputError, match=message):
        tt.load_task(f"hub:{folder}", **{"text": "words", "label": "kind", **options})


def test_ready_entries_ask_for_their_dataset(monkeypatch: pytest.MonkeyPatch, library: Any) -> None:
    """Each name of the hub reads its dataset, split and columns."""
    assert set(HUB_TASKS) >= {"sst2", "ag_news", "trec"}
    asked = {}
    for name, entry in HUB_TASKS.items():

        def load(
            dataset: str, config: Any, split: str, entry: Any = entry, name: str = name
        ) -> Any:
            asked[name] = (dataset, config, split)
            return library.Dataset.from_dict(
                {entry.text: ["cat", "a town by the sea"], entry.label: ["x", "y"]}
            )

        monkeypatch.setattr(library, "load_dataset", load)
        task = tt.load_task(name)
        assert task.name == name
        assert task.texts == {"x": ("cat",), "y": ("a town by the sea",)}
    assert asked == {name: (e.dataset, e.config, e.split) for name, e in HUB_TASKS.items()}


@pytest.mark.parametrize("source", ["sst2", "hub:nobody/nothing"])
def test_no_network(library: Any, source: str) -> None:
    with pytest.raises(
        tt.errors.InputError,
        match=r"could not be loaded from the hub \(.*check the name and the network",
    ):
        tt.load_task(source)


def test_the_hub_needs_datasets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(
        tt.errors.InputError, match=r"'trec' is on the hub.*pip install 'twotower\[hub\]'"
    ):
        tt.load_task("trec")
