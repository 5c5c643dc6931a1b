"""Wrong tasks, prompts and positions: one clear error each."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bad_input import INPUT, refused
from tiny import TWO, tiny

import twotower as tt

TEXT, SPANS = "cat: foo\nParis: bar\ndog:", [(5, 8), (16, 19)]


@pytest.fixture(scope="module")
def prompts(llama: tt.Model) -> tt.Prompts:
    return tt.build_prompts(llama, TWO, shots=2, n=4)


def build(prompts: tt.Prompts, labels: Any = None, **options: Any) -> tt.Prompts:
    return tt.build_prompts(tiny("llama-grouped"), TWO, labels, **options)


def strings(gold: Any = ("foo",), spans: Any = SPANS, **options: Any) -> tt.Prompts:
    return tt.prompts_from_strings(tiny("llama-grouped"), [TEXT], [spans], gold, **options)


def task(name: Any = "t", texts: Any = None, **about: Any) -> tt.Task:
    return tt.Task(name, {"a": ["x"], "b": ["y"]} if texts is None else texts, **about)


PROMPTS = {
    "too few labels": (lambda p: build(p, ["foo"]), INPUT, "2 classes .* there are 1 labels"),
    "labels alike": (lambda p: build(p, ["foo", "foo"]), INPUT, "labels must differ"),
    "a label's number": (lambda p: build(p, ["foo", 3]), INPUT, "label 3 must be a word"),
    "a blank label": (lambda p: build(p, ["foo", ""]), INPUT, "label '' must be a word"),
    "shots below 0": (lambda p: build(p, shots=-1), INPUT, "shots=-1 must be"),
    "no shots": (lambda p: build(p, shots=0), INPUT, "at least one demonstration"),
    "half a shot": (lambda p: build(p, shots=1.5), INPUT, "shots=1.5 must be"),
    "shots a list": (lambda p: build(p, shots=[1, 2]), INPUT, r"shots=\[1, 2\] must be"),
    "shots of one label": (lambda p: build(p, shots={"foo": 1}), INPUT, "shots names the labels"),
    "more shots than texts": (lambda p: build(p, shots=99), INPUT, "99 shots and a query need"),
    "no n": (lambda p: build(p, n=0), INPUT, "n=0 must be"),
    "n a text": (lambda p: build(p, n="4"), INPUT, "n='4' must be"),
    "n beyond bounds": (lambda p: build(p, n=10**9), INPUT, "n=1000000000 must be .* to 1000000"),
    "a seed's half": (lambda p: build(p, seed=0.5), INPUT, "seed=0.5 must be"),
    "a bare template": (lambda p: build(p, template="x"), INPUT, "must hold {text} and then"),
    "label before text": (lambda p: build(p, template="{label}{text}"), INPUT, "must hold {text}"),
    "order unknown": (lambda p: build(p, order="sideways"), INPUT, "order='sideways' is not known"),
    "shared perhaps": (lambda p: build(p, shared_demonstrations="no"), INPUT, "True or False"),
    "beyond the context": (lambda p: build(p, instruction="x" * 5000), INPUT, "model takes 256"),
    "no model": (
        lambda p: tt.prompts_from_strings(None, [TEXT], [SPANS], ["foo"]),
        INPUT,
        "model must be the result of load",
    ),
    "no strings": (
        lambda p: tt.prompts_from_strings(tiny("llama-grouped"), [], [], []),
        INPUT,
        "there are no prompts",
    ),
    "spans of two prompts": (
        lambda p: tt.prompts_from_strings(tiny("llama-grouped"), [TEXT], [SPANS, SPANS], ["foo"]),
        INPUT,
        "one of each per prompt",
    ),
    "spans of none": (
        lambda p: tt.prompts_from_strings(tiny("llama-grouped"), [TEXT], None, ["foo"]),
        INPUT,
        "label_spans= must be a list",
    ),
    "gold none": (lambda p: strings(None), INPUT, "gold= must be a list of texts"),
    "gold unknown": (lambda p: strings(["zzz"]), INPUT, "'zzz' is not among the labels"),
    "own labels a number": (lambda p: strings(labels=3), INPUT, "labels= must be a list"),
    "other labels": (lambda p: strings(labels=["bar", "map"]), INPUT, "are not in labels="),
    "classes a number": (lambda p: strings(classes=3), INPUT, "classes= must be a list"),
    "a class too many": (
        lambda p: strings(classes=[["a", "b", "c"]], query_class=["a"]),
        INPUT,
        "2 labels and 3 classes",
    ),
    "query_class a text": (
        lambda p: strings(classes=[["a", "b"]], query_class="a"),
        INPUT,
        "query_class= must be a list",
    ),
    "a span beyond the text": (lambda p: strings(spans=[(5, 99)]), INPUT, "ends beyond the text"),
    "a span turned round": (lambda p: strings(spans=[(8, 5)]), INPUT, "is empty, overlaps"),
    "orders none": (lambda p: p.reordered(None), INPUT, "orders=None must be 4 lists"),
    "too few orders": (lambda p: p.reordered([[0, 1, 2, 3]]), INPUT, "must be 4 lists"),
    "an order of doubles": (lambda p: p.reordered([[0, 0, 1, 1]] * 4), INPUT, "each demonstration"),
    "an order of numbers": (lambda p: p.reordered([3] * 4), INPUT, "each demonstration"),
    "by a name": (lambda p: p["x"], INPUT, "pick prompts by a number"),
    "by a half": (lambda p: p[1.5], INPUT, "pick prompts by a number"),
    "by none": (lambda p: p[None], INPUT, "pick prompts by a number"),
    "beyond the end": (lambda p: p[[99]], IndexError, r"prompts \[99\] of 4"),
    "one beyond the end": (lambda p: p[99], IndexError, "prompt 99 of 4"),
    "by a short mask": (lambda p: p[np.zeros(2, bool)], INPUT, "True and False for each"),
    "where nowhere": (lambda p: p.where("here"), INPUT, "positions='here' is not known"),
    "a split of nothing": (lambda p: p.split(0.01), INPUT, "a part is empty"),
    "the queries' seed": (lambda p: p.other_queries("x"), INPUT, "seed='x' must be"),
    "no prompts": (lambda p: p[:0].reversed_labels(), INPUT, "there are no prompts"),
    "role unknown": (lambda p: tt.at(role="labels").mask(p), INPUT, "has the role 'labels'"),
    "role a number": (lambda p: tt.at(role=3), INPUT, "role=3 must be a text"),
    "label a number": (lambda p: tt.at(label=3), INPUT, "label=3 must be a text"),
    "class a number": (lambda p: tt.at(demonstration_class=5), INPUT, "must be a text"),
    "demonstration below 0": (lambda p: tt.at(demonstration=-1), INPUT, "demonstration=-1 must"),
    "same perhaps": (lambda p: tt.at(same_class="yes"), INPUT, "must be True or False"),
    "at nothing": (lambda p: tt.at(), INPUT, "needs a property"),
}

HALF = "holds U+D800, half of a surrogate pair"
UNENCODABLE = {
    "a label": lambda: tt.build_prompts(tiny("llama-grouped"), TWO, ["foo", "b\ud800"]),
    "a label by class": lambda: tt.build_prompts(
        tiny("llama-grouped"), TWO, {"animal": "foo", "city": "b\ud800"}
    ),
    "a template": lambda: tt.build_prompts(
        tiny("llama-grouped"), TWO, template="{text}\ud800: {label}\n"
    ),
    "an instruction": lambda: tt.build_prompts(tiny("llama-grouped"), TWO, instruction="\ud800"),
    "a string": lambda: tt.prompts_from_strings(
        tiny("llama-grouped"), [TEXT + "\ud800:"], [SPANS], ["foo"]
    ),
    "a right answer": lambda: strings(["\ud800"]),
    "an own label": lambda: strings(labels=["foo", "\ud800"]),
    "an own class": lambda: strings(classes=[["a", "\ud800"]], query_class=["a"]),
    "a query's class": lambda: strings(classes=[["a", "b"]], query_class=["\ud800"]),
    "a text": lambda: task(texts={"a": ["x\ud800"], "b": ["y"]}),
    "a class": lambda: task(texts={"a\ud800": ["x"], "b": ["y"]}),
    "a task's name": lambda: task("\ud800"),
    "a source": lambda: task(source="\ud800"),
    "a file": lambda: tt.load_task("\ud800.csv"),
}

TASKS = {
    "no name": (lambda: task(None), INPUT, "name None must be a text"),
    "a blank name": (lambda: task(" "), INPUT, "name ' ' must be a text"),
    "kind": (lambda: task(kind="poems"), INPUT, "kind='poems' is not known; use one of words"),
    "hard perhaps": (lambda: task(hard="no"), INPUT, "hard='no' must be True or False"),
    "description": (lambda: task(description=3), INPUT, "description=3 must be a text"),
    "source": (lambda: task(source=None), INPUT, "source=None must be a text"),
    "no classes": (lambda: task(texts={}), INPUT, "0 class; it needs at least 2"),
    "a list": (lambda: task(texts=["a"]), INPUT, "must be a dict of class name to texts"),
    "a class of numbers": (lambda: task(texts={"a": [3], "b": ["x"]}), INPUT, "holds 3, which"),
    "a class of blanks": (lambda: task(texts={"a": [" "], "b": ["x"]}), INPUT, "holds ' ', which"),
    "a class a text": (lambda: task(texts={"a": "abc", "b": ["x"]}), INPUT, "needs a list of"),
    "an empty class": (lambda: task(texts={"a": [], "b": ["x"]}), INPUT, "has no texts"),
    "unknown": (lambda: tt.load_task("zzz"), INPUT, "there is no task 'zzz'. Bundled: "),
    "a number": (lambda: tt.load_task(3), INPUT, "3 is neither a task name"),
    "no file": (lambda: tt.load_task("z.csv"), INPUT, "there is no file z.csv"),
    "no dataset": (lambda: tt.load_task("hub:"), INPUT, "names no dataset; write hub:owner/"),
    "texts a class": (lambda: tt.load_task("sst2", max_per_class=0), INPUT, "max_per_class=0"),
    "the draw's seed": (lambda: tt.load_task("sst2", seed=-1), INPUT, "seed=-1 must be"),
    "a column": (lambda: tt.load_task("a.csv", text=3), INPUT, "text=3 must be a text"),
    "a split": (lambda: tt.load_task("sst2", split=3), INPUT, "split=3 must be a text"),
    "a configuration": (lambda: tt.load_task("sst2", config=3), INPUT, "config=3 must be a text"),
}

FILES = {
    "other columns": (
        "t.csv",
        b"a,b\n1,2\n",
        "has no column 'text'; it has a, b. Name",
    ),
    "nothing": ("t.csv", b"", "holds no rows"),
    "a head alone": ("t.csv", b"text,label\n", "holds no rows"),
    "bytes": ("t.csv", b"\xff\xfe\x00\x01", "it is not utf-8 but UTF-16"),
    "one class": ("t.csv", b"text,label\na,x\n", "has 1 class"),
    "no class": ("t.csv", b"text,label\na,x\nb,\n", "row 2 of t has no class"),
    "half a character": (
        "t.json",
        b'[{"text": "\\ud800", "label": "a"}, {"text": "x", "label": "b"}]',
        re.escape(HALF),
    ),
    "half a row": ("t.csv", b"text,label\na\n", "line 2: .* 2 columns and this row has 1"),
    "no JSON": ("t.jsonl", b"{nope\n", "line 1: Expecting property name"),
    "a list a line": ("t.jsonl", b"[1, 2]\n", r"it has \[1, 2\]"),
    "a number a line": ("t.jsonl", b"3\n", "it has 3"),
    "a list for a text": ("t.jsonl", b'{"text": [1], "label": "a"}', r"holds \[1\] in 'text'"),
    "a text in two classes": ("t.csv", b"text,label\na,x\na,y\n", "is in the classes"),
}


@pytest.mark.parametrize("name", PROMPTS)
def test_prompts(name: str, prompts: tt.Prompts) -> None:
    refused(PROMPTS[name], prompts)


@pytest.mark.parametrize("name", UNENCODABLE)
def test_texts_that_no_tokenizer_takes(name: str) -> None:
    refused((UNENCODABLE[name], INPUT, re.escape(HALF)))


@pytest.mark.parametrize("name", TASKS)
def test_tasks(name: str) -> None:
    refused(TASKS[name])


@pytest.mark.parametrize("name", FILES)
def test_files(name: str, tmp_path: Path) -> None:
    file, content, message = FILES[name]
    (tmp_path / file).write_bytes(content)
    refused((lambda: tt.load_task(str(tmp_path / file)), INPUT, message))
