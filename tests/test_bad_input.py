"""Wrong arguments over the whole surface: one clear error each, of the package's own classes."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from bad_input import INPUT, SCHEMA, STORE, refused
from surface import under
from tiny import TWO

import twotower as tt
from twotower.results.place import Place
from twotower.runs.configuration import Configuration
from twotower.statistics import bootstrap_mean

TEXT, SPANS = "cat: foo\nParis: bar\ndog:", [(5, 8), (16, 19)]


@pytest.fixture(scope="module")
def given(llama: tt.Model) -> SimpleNamespace:
    prompts = tt.build_prompts(llama, TWO, shots=1, n=4)
    effects = tt.head_effects(llama, prompts)
    return SimpleNamespace(model=llama, prompts=prompts, effects=effects)


def strings(model, text=TEXT, spans=SPANS, gold=("foo",), **more):
    return tt.prompts_from_strings(model, [text], [spans], list(gold), **more)


CASES = {
    # prompts
    "a task's name": (
        lambda g: tt.build_prompts(g.model, "animals"),
        INPUT,
        "task must be the result of",
    ),
    "no task": (
        lambda g: tt.build_prompts(g.model, None),
        INPUT,
        "task must be the result of load_task",
    ),
    "no model": (lambda g: tt.build_prompts(None, TWO), INPUT, "model must be the result of load"),
    "turned round": (lambda g: tt.build_prompts(TWO, g.model), INPUT, "model must be"),
    "labels of a dict": (
        lambda g: tt.build_prompts(g.model, TWO, {"animal": "foo", "town": "bar"}),
        INPUT,
        "names the classes animal, town; name each class of .* once: animal, city",
    ),
    "labels a number": (
        lambda g: tt.build_prompts(g.model, TWO, 5),
        INPUT,
        "must be a list of words",
    ),
    "template none": (
        lambda g: tt.build_prompts(g.model, TWO, template=None),
        INPUT,
        "must be a text",
    ),
    "instruction": (
        lambda g: tt.build_prompts(g.model, TWO, instruction=3),
        INPUT,
        "must be a text",
    ),
    "a word for no": (
        lambda g: tt.build_prompts(g.model, TWO, permute_labels="no"),
        INPUT,
        "must be True or False",
    ),
    "classes and no query's": (
        lambda g: strings(g.model, classes=[["animal", "city"]]),
        INPUT,
        "need query_class=",
    ),
    "whole numbers for classes": (
        lambda g: strings(g.model, classes=[[1, 2]], query_class=["x"]),
        INPUT,
        "must be texts",
    ),
    "a blank at the end": (lambda g: strings(g.model, TEXT + " "), INPUT, "ends in a space"),
    "spans none": (lambda g: strings(g.model, spans=None), INPUT, "must be a list of"),
    "spans flat": (lambda g: strings(g.model, spans=[5, 8]), INPUT, "must be a list of"),
    "spans of floats": (lambda g: strings(g.model, spans=[(5.0, 8.0)]), INPUT, "must be a list of"),
    "spans of three": (lambda g: strings(g.model, spans=[(5, 8, 9)]), INPUT, "must be a list of"),
    "no string": (lambda g: strings(g.model, None), INPUT, "strings= must be"),
    "one string": (
        lambda g: tt.prompts_from_strings(g.model, TEXT, [SPANS], ["foo"]),
        INPUT,
        "strings= must be",
    ),
    "one label": (
        lambda g: tt.predict(g.model, strings(g.model, "cat: foo\ndog:", [(5, 8)])),
        INPUT,
        "there is only one label",
    ),
    "fraction a text": (lambda g: g.prompts.split("x"), INPUT, "finite number"),
    "fraction none": (lambda g: g.prompts.split(None), INPUT, "finite number"),
    "a seed below 0": (lambda g: g.prompts.split(seed=-1), INPUT, "seed=-1 must be"),
    "a seed of letters": (lambda g: g.prompts.split(seed="x"), INPUT, "seed='x' must be"),
    "a task split at 2": (lambda g: TWO.split(2.0, 0), INPUT, "strictly between"),
    "a task split at nan": (lambda g: TWO.split(np.nan, 0), INPUT, "finite number"),
    "a task's seed": (lambda g: TWO.split(0.5, -1), INPUT, "seed=-1 must be"),
    "a class's number": (
        lambda g: tt.Task("t", {1: ["a"], "1": ["b"]}),
        INPUT,
        "needs a different name",
    ),
    "a class without name": (
        lambda g: tt.Task("t", {"": ["a"], "x": ["b"]}),
        INPUT,
        "needs a name",
    ),
    "a text in two classes": (
        lambda g: tt.Task("t", {"p": ["a b"], "q": ["a  b "]}),
        INPUT,
        "is in the classes",
    ),
    "a task none": (lambda g: tt.load_task(None), INPUT, "neither a task name"),
    # edits
    "heads none": (lambda g: tt.KnockOut(None, positions="all"), INPUT, "must be a list of"),
    "heads a number": (lambda g: tt.KnockOut(3, positions="all"), INPUT, "must be a list of"),
    "heads of truth": (
        lambda g: predict(g, tt.KnockOut([(True, False)], positions="all")),
        INPUT,
        "is not a head",
    ),
    "a reference's name": (
        lambda g: tt.KnockOut([(0, 0)], positions="all", to=tt.Mean("x")),
        INPUT,
        "reference must be the result of",
    ),
    "an edit's seed": (
        lambda g: tt.Resample(g.prompts, seed=-1),
        INPUT,
        "seed=-1 must be",
    ),
    "factor true": (
        lambda g: tt.KnockOut([(0, 0)], "all", to=tt.Times(True)),
        INPUT,
        "finite number",
    ),
    "factor complex": (
        lambda g: tt.KnockOut([(0, 0)], "all", to=tt.Times(1j)),
        INPUT,
        "finite number",
    ),
    "factor fraction": (lambda g: tt.Times(Fraction(1, 2)), INPUT, "finite number"),
    "factor bytes": (
        lambda g: tt.KnockOut([(0, 0)], "all", to=tt.Times(b"1")),
        INPUT,
        "finite number",
    ),
    "factor too large": (
        lambda g: tt.KnockOut([(0, 0)], "all", to=tt.Times(10**400)),
        INPUT,
        "finite number",
    ),
    "edits an array without dims": (
        lambda g: predict(g, np.array(tt.KnockOut([(0, 0)]))),
        INPUT,
        "must be a list of edits",
    ),
    "heads an array without dims": (
        lambda g: tt.KnockOut(np.array(3)),
        INPUT,
        "must be a list of",
    ),
    **{
        f"{name} an array without dims": (ask, INPUT, "must|is not|needs|names|choose")
        for name, ask in {
            "groups": lambda g: tt.group_effects(g.model, g.prompts, np.array(1)),
            "sources": lambda g: tt.edge_effects(g.model, g.prompts, np.array(1)),
            "a source": lambda g: tt.edge_effects(g.model, g.prompts, [np.array(1)]),
            "roles": lambda g: tt.at(role=np.array(1)),
            "demonstrations": lambda g: tt.at(demonstration=np.array(-1)),
            "texts": lambda g: tt.contrast(g.model, np.array("b"), [" a"]),
            "wrong answers": lambda g: tt.contrast(g.model, ["b:"], [" a"], [np.array(1)]),
            "a task": lambda g: tt.Task("t", np.array(1)),
            "pairs": lambda g: tt.PairTask("t", np.array(1)),
            "labels": lambda g: tt.build_prompts(g.model, TWO, labels=np.array(1)),
            "strings": lambda g: tt.prompts_from_strings(g.model, np.array(1), [], []),
            "spans": lambda g: strings(g.model, spans=np.array(1)),
            "orders": lambda g: g.prompts.reordered(np.array(1)),
            "completions": lambda g: tt.trace_effects(g.model, g.prompts, np.array(1)),
        }.items()
    },
    "edges none": (lambda g: tt.CutEdges(None), INPUT, "edges=None must be a list"),
    "no demonstrations": (lambda g: tt.at(demonstration=[]), INPUT, "names no demonstration"),
    "a span that overlaps itself": (
        lambda g: tt.contrast(g.model, ["b aaa:"], [" c"], [" d"], [{"A": "aa"}]),
        INPUT,
        "occurs 2 times",
    ),
    "answers a dict": (
        lambda g: tt.contrast(g.model, ["b:"], {" foo": 1}),
        INPUT,
        "right=",
    ),
    "prompts as the model": (
        lambda g: tt.build_prompts(g.prompts, TWO),
        INPUT,
        "model must be the result of load",
    ),
    "heads by a list": (
        lambda g: g.effects.tt.heads(2, by=["margin_drop"]),
        INPUT,
        "is not known",
    ),
    "measures an array": (
        lambda g: tt.analyze(g.model, g.prompts, measures=np.zeros((2, 2))),
        INPUT,
        "choose a list from",
    ),
    "a mean over two dims": (
        lambda g: bootstrap_mean(np.zeros((4, 3))),
        INPUT,
        r"shape \(4, 3\) must be by prompt",
    ),
    "an edge from a number": (
        lambda g: tt.faithfulness(g.model, g.prompts, {"mine": [(1.1, "2.0", "q")]}),
        INPUT,
        "1.1 is not a head",
    ),
    "means over no prompts": (
        lambda g: tt.head_effects(g.model, g.prompts, to=tt.Mean(g.prompts[99:])),
        INPUT,
        "there are no prompts",
    ),
    "no donors": (
        lambda g: tt.causal_tracing(g.model, g.prompts, g.prompts[99:]),
        INPUT,
        "no prompts|0 donors",
    ),
    "edits none": (lambda g: predict(g, None), INPUT, "must be a list of edits"),
    "edits a number": (lambda g: predict(g, 3), INPUT, "must be a list of edits"),
    # measures
    "batch of text": (
        lambda g: under(tt.predict, g.model, g.prompts, batch_size="2"),
        INPUT,
        "batch_size=",
    ),
    "batch of a half": (
        lambda g: under(tt.predict, g.model, g.prompts, batch_size=1.5),
        INPUT,
        "batch_size=",
    ),
    "batch of nan": (
        lambda g: under(tt.predict, g.model, g.prompts, batch_size=np.nan),
        INPUT,
        "batch_size=",
    ),
    "batch of none": (
        lambda g: under(tt.predict, g.model, g.prompts, batch_size=0),
        INPUT,
        "batch_size=",
    ),
    "prompts of text": (
        lambda g: tt.predict(g.model, ["a"]),
        INPUT,
        "prompts must be the result of",
    ),
    "prompts first": (
        lambda g: tt.predict(g.prompts, g.model),
        INPUT,
        "model must be the result of",
    ),
    "no prompts": (lambda g: tt.predict(g.model, g.prompts[:0]), INPUT, "there are no prompts"),
    "sweep of text": (
        lambda g: tt.head_effects(g.model, "x"),
        INPUT,
        "prompts must be the result of",
    ),
    "sweep's seed": (
        lambda g: tt.head_effects(g.model, g.prompts, to=tt.Resample(g.prompts, -1)),
        INPUT,
        "seed=-1 must be",
    ),
    "measures none": (
        lambda g: tt.analyze(g.model, g.prompts, measures=None),
        INPUT,
        "choose a list from",
    ),
    "measures a text": (
        lambda g: tt.analyze(g.model, g.prompts, measures="qk"),
        INPUT,
        "choose a list from",
    ),
    "norm unmeasured": (
        lambda g: tt.analyze(g.model, g.prompts, measures=["qk"], norm="x"),
        INPUT,
        "norm='x'",
    ),
    "tracing of text": (
        lambda g: tt.causal_tracing(g.model, g.prompts, "x"),
        INPUT,
        "corrupted must be",
    ),
    "heads of nothing": (
        lambda g: tt.in_context_heads(None),
        INPUT,
        "needs the result of head_effects",
    ),
    "heads of a mean": (
        lambda g: tt.in_context_heads(g.effects.mean("prompt")),
        INPUT,
        "needs the result of head_effects",
    ),
    "heads of no prompts": (
        lambda g: tt.in_context_heads(g.effects.isel(prompt=slice(0, 0))),
        INPUT,
        "no effect is known",
    ),
    "heads of nan": (lambda g: tt.in_context_heads(g.effects * np.nan), INPUT, "not finite"),
    "by a list": (lambda g: tt.in_context_heads(g.effects, by=["x"]), INPUT, "is not known"),
    "scores of effects": (lambda g: tt.two_tower_scores(g.effects), INPUT, "need the group"),
    "scores of nothing": (lambda g: tt.two_tower_scores(None), INPUT, "need the group"),
}


def predict(given: SimpleNamespace, edits):
    return tt.predict(given.model, given.prompts, edits)


@pytest.mark.parametrize("name", CASES)
def test_input_error(name: str, given: SimpleNamespace) -> None:
    refused(CASES[name], given)


STORES = {
    "none": (lambda g, path: tt.save(None, path), SCHEMA, "is not a run"),
    "text": (lambda g, path: tt.save("x", path), SCHEMA, "is not a run"),
    "mean": (
        lambda g, path: tt.save(g.effects.mean("prompt", keep_attrs=True), path),
        SCHEMA,
        "has dims",
    ),
    "nowhere": (lambda g, path: tt.save(g.effects, None), STORE, "is not a path"),
    "number": (lambda g, path: tt.save(g.effects, 3), STORE, "is not a path"),
    "long": (lambda g, path: tt.save(g.effects, "x" * 300), STORE, "cannot be a store"),
    "below a file": (
        lambda g, path: tt.save(g.effects, Path(__file__) / "run.zarr"),
        STORE,
        "not a writable folder|cannot be a store",
    ),
    "open none": (lambda g, path: tt.open(None), STORE, "is not a path"),
    "open long": (lambda g, path: tt.open("x" * 300), STORE, "cannot be a store"),
}


@pytest.mark.parametrize("name", STORES)
def test_stores(name: str, given: SimpleNamespace, tmp_path: Path) -> None:
    refused(STORES[name], given, tmp_path / "run.zarr")
    assert not list(tmp_path.iterdir())


def test_a_group_of_a_run_is_saved_as_itself(given: SimpleNamespace, tmp_path: Path) -> None:
    run = tt.analyze(given.model, given.prompts, measures=["effects"])
    tt.save(run["effects"], tmp_path / "effects.zarr")
    again = tt.open(tmp_path / "effects.zarr")
    assert list(again.children) == ["effects"]
    assert again["effects"]["margin_drop"].equals(run["effects"]["margin_drop"])


def test_a_group_that_went_missing(given: SimpleNamespace, tmp_path: Path) -> None:
    import shutil

    path = tt.save(tt.analyze(given.model, given.prompts), tmp_path / "run.zarr")
    shutil.rmtree(path / "effects")
    with pytest.raises(tt.errors.StoreError, match="groups effects are missing"):
        tt.open(path)


def test_home_is_known(given: SimpleNamespace, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    tt.save(given.effects, "~/run.zarr")
    assert (tmp_path / "run.zarr").is_dir()
    assert not (tmp_path / "~").exists()
    assert tt.open("~/run.zarr")["effects"].to_dataset().equals(given.effects)
    assert Place(Configuration(output="~/x.zarr").store).path == tmp_path / "x.zarr"


def test_an_edit_keeps_its_heads(given: SimpleNamespace) -> None:
    found = predict(given, tt.KnockOut(iter([(1, 2)]), positions="all"))
    assert '"heads": [[1, 2]]' in found.attrs["settings"]


@pytest.mark.parametrize(
    "line",
    [
        "labels: [yes, no]",
        "labels: foo",
        "n: four",
        "n: 4.5",
        "n: true",
        "seed: '1'",
        "overwrite: 1",
        "threads: a",
        "shots: {foo: 2, bar: 1}",
        "task: 3",
        "model: null",
        "batch_size: 2.5",
    ],
)
def test_settings_of_other_types(line: str, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(line)
    with pytest.raises(tt.errors.InputError, match=f"{line.split(':')[0]}: .* must be"):
        Configuration.from_yaml(path)
