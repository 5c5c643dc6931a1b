"""Wrong questions of runs, figures, stores and planted models: one clear error each."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import xarray as xr
from bad_input import INPUT, SCHEMA, STORE, refused
from matplotlib import pyplot as plt
from tiny import TWO

import twotower as tt
from twotower import figures
from twotower.testing import Planting

BARE = xr.Dataset()


@pytest.fixture(scope="module")
def given(llama: tt.Model) -> SimpleNamespace:
    prompts = tt.build_prompts(llama, TWO, shots=1, n=4)
    run = tt.analyze(llama, prompts)
    answers = run["predictions"].to_dataset(inherit=False)
    bias = tt.label_bias(answers, ["foo"] * 4)
    return SimpleNamespace(run=run, answers=answers, bias=bias, tt=run.tt, figure=run.tt.figure)


def page(given: SimpleNamespace, path: Any = "run.html", **options: Any) -> Path:
    return figures.write_report(given.run, path, **options)


QUESTIONS = {
    "no heads": (lambda g: g.tt.heads(0), INPUT, "k=0 must be"),
    "heads by a number": (lambda g: g.tt.heads(2, by=3), INPUT, "by=3 is not known"),
    "heads of answers": (lambda g: g.answers.tt.heads(), INPUT, "needs the result of head_effects"),
    "a head of truth": (lambda g: g.tt.head(True, 0), INPUT, "layer=True must be"),
    "a head beyond": (lambda g: g.tt.head(0, 9), INPUT, "no head 9"),
    "a head of answers": (lambda g: g.answers.tt.head(0, 0), INPUT, "no dim 'layer' here"),
    "no roles": (lambda g: g.tt.roles(), INPUT, "give one or more of the roles"),
    "a list of roles": (lambda g: g.tt.roles(["label"]), INPUT, r"role=\['label'\] is not known"),
    "roles of nothing": (lambda g: BARE.tt.roles("label"), INPUT, "no dim 'position' here"),
    "a label's number": (lambda g: g.tt.logit_minus(3, 4), INPUT, "label 3 is not among foo, bar"),
    "labels in a list": (lambda g: g.tt.logit_minus(["foo"], "bar"), INPUT, "is not among"),
    "mean over a number": (lambda g: g.tt.mean_ci(3), INPUT, "dim=3 must be the name"),
    "mean over nothing": (lambda g: g.tt.mean_ci("x"), INPUT, "there is no dim 'x' here"),
    "a level": (lambda g: g.tt.mean_ci("prompt", level=95), INPUT, "level=95 must be between"),
    "a level nan": (lambda g: g.tt.mean_ci("prompt", level=np.nan), INPUT, "level=nan must be"),
    "a table of nothing": (lambda g: BARE.tt.to_frame(), INPUT, "no rows to list"),
    "weights of no run": (lambda g: xr.DataTree().tt.weighted(), INPUT, "is not a run"),
    "scores of no run": (lambda g: tt.two_tower_scores(xr.DataTree()), INPUT, "need the group"),
}

FIGURES = {
    "a map of nothing": (lambda g: figures.head_map(None), INPUT, "a NoneType is not a run"),
    "a map of a path": (lambda g: figures.head_map("run.zarr"), INPUT, "a str is not a run"),
    "a map by": (lambda g: g.figure.head_map(by=["x"]), INPUT, r"by=\['x'\] is not in the run"),
    "marks a number": (lambda g: g.figure.head_map(heads=3), INPUT, "heads=3 must be a list"),
    "marks beyond": (lambda g: g.figure.head_map(heads=[(9, 9)]), INPUT, "has no head 9.9"),
    "a place to draw": (lambda g: g.figure.head_map(ax=3), INPUT, "ax=3 must be matplotlib Axes"),
    "towers of answers": (lambda g: figures.two_towers(g.answers), INPUT, "no numbers of heads"),
    "layers of nothing": (lambda g: figures.effect_by_layer(None), INPUT, "is not a run"),
    "attention of a text": (lambda g: g.figure.attention("x"), INPUT, "'x' is not a head"),
    "attention beyond": (lambda g: g.figure.attention((9, 0)), INPUT, "has no head 9.0"),
    "a prompt below 0": (lambda g: g.figure.attention((0, 0), -1), INPUT, "prompt=-1 must be"),
    "a prompt beyond": (lambda g: g.figure.attention((0, 0), 9), INPUT, "prompt 9 is not in"),
    "weighted perhaps": (
        lambda g: g.figure.label_logits((0, 0), weighted="no"),
        INPUT,
        "weighted='no' must be True or False",
    ),
    "no curves": (lambda g: figures.knocked_out(None), INPUT, "curves must map"),
    "curves by words": (
        lambda g: figures.knocked_out({"a": {"x": 1}}),
        INPUT,
        "curves must map names",
    ),
    "a curve of a run": (lambda g: figures.knocked_out({"a": {0: g.bias}}), INPUT, "is not what"),
    "a measure": (lambda g: figures.knocked_out({}, measure="x"), INPUT, "measure='x' is not"),
    "a kind": (lambda g: figures.bias_curves({}, kind="x"), INPUT, "kind='x' is not known"),
    "bias of nothing": (lambda g: figures.bias_curves({"a": {1: None}}), INPUT, "is not what"),
    "a table of answers": (lambda g: figures.head_table(g.answers), INPUT, "no numbers of heads"),
    "no prompt": (lambda g: figures.prompt_view(g.run, None), INPUT, "prompt=None must be"),
    "a page nowhere": (lambda g: page(g, None), INPUT, "path=None must be a path"),
    "a page of zero": (lambda g: page(g, "a\0.html"), INPUT, "must be a path"),
    "a page's long name": (lambda g: page(g, "y" * 300), INPUT, "cannot be written: File name"),
    "a page in no folder": (lambda g: page(g, "no/run.html"), INPUT, "folder is not there"),
    "a page beside a number": (lambda g: page(g, other=3), INPUT, "a int is not a run"),
    "names a number": (lambda g: page(g, names=3), INPUT, "names=3 must be 1 texts"),
    "names of numbers": (lambda g: page(g, names=[1]), INPUT, "must be 1 texts"),
    "prompts a number": (lambda g: page(g, prompts=3), INPUT, "prompts=3 must be a list"),
    "prompts of texts": (lambda g: page(g, prompts=["a"]), INPUT, "prompt='a' must be"),
    "a prompt twice": (lambda g: page(g, prompts=[0, 0]), INPUT, "prompt 0 is named twice"),
    "a small page": (lambda g: page(g, most_bytes=9), INPUT, "most_bytes=9 must be"),
}

PLANTINGS = {
    "architecture": (lambda: Planting(["llama"]), INPUT, "architecture=.* is not known"),
    "layers": (lambda: Planting(n_layers="x"), INPUT, "n_layers='x' must be"),
    "heads": (lambda: Planting(n_heads=0), INPUT, "n_heads=0 must be"),
    "classes": (lambda: Planting(n_classes=99), INPUT, "n_classes=99 must be"),
    "width": (lambda: Planting(d_head=[32]), INPUT, "must be 32 or 64"),
    "texts": (lambda: Planting(n_texts=1), INPUT, "n_texts=1 must be"),
    "seed": (lambda: Planting(seed=-1), INPUT, "seed=-1 must be"),
    "noise": (lambda: Planting(noise=-1), INPUT, "noise=-1 must be 0 or more"),
    "recency": (lambda: Planting(recency=np.inf), INPUT, "recency=inf must be a finite"),
    "gather none": (lambda: Planting(gather=None), INPUT, "gather=.*must be heads"),
    "gather of three": (lambda: Planting(gather=(1, 2, 3)), INPUT, "gather=.*must be heads"),
    "gather a text": (lambda: Planting(gather="ab"), INPUT, "layer of a head='a' must be"),
    "match none": (lambda: Planting(match=None), INPUT, "match=None must be heads"),
    "match a pair": (lambda: Planting(match=(2, 1)), INPUT, r"match=\(2, 1\) must be heads"),
    "match beyond": (lambda: Planting(match=[(9, 0)]), INPUT, "layer of a head=9"),
    "distractors none": (lambda: Planting(distractors=None), INPUT, "must be a dict"),
    "distractors listed": (lambda: Planting(distractors=[]), INPUT, "must be a dict"),
    "distractors' kind": (lambda: Planting(distractors={3: []}), INPUT, "silent, loud, recent"),
    "distractors a number": (lambda: Planting(distractors={"loud": 3}), INPUT, "must be heads"),
    "random architecture": (lambda: Planting.random("bert", 0), INPUT, "architecture='bert'"),
    "random seed": (lambda: Planting.random("llama", "x"), INPUT, "seed='x' must be"),
    "saved nowhere": (lambda: Planting().save(None), INPUT, "folder=None must be a path"),
    "saved in a file": (lambda: Planting().save(__file__), INPUT, "cannot be made: File"),
    "loaded anew": (lambda: Planting().load(dtype="float32"), INPUT, "is loaded already"),
    "prompts of no model": (
        lambda: Planting().prompts(None),
        INPUT,
        "model must be the result of load",
    ),
}


@pytest.mark.parametrize("name", QUESTIONS)
def test_questions(name: str, given: SimpleNamespace) -> None:
    refused(QUESTIONS[name], given)


@pytest.mark.parametrize("name", FIGURES)
def test_figures(name: str, given: SimpleNamespace, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    refused(FIGURES[name], given)
    assert plt.get_fignums() == []
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", PLANTINGS)
def test_plantings(name: str) -> None:
    refused(PLANTINGS[name])


# ---- stores --------------------------------------------------------------------------------------

SAVED = {
    "zero in its name": (lambda g: tt.save(g.run, "a\0b"), STORE, "is not a path"),
    "bytes": (lambda g: tt.save(g.run, b"x"), STORE, "is not a path"),
    "the folder itself": (lambda g: tt.save(g.run, ""), STORE, "exists already"),
    "replaced perhaps": (lambda g: tt.save(g.run, "r", overwrite="no"), INPUT, "overwrite='no'"),
    "half a dataset": (lambda g: tt.save(g.answers.drop_vars("margin"), "r"), SCHEMA, "lacks the"),
    "an empty dataset": (lambda g: tt.save(BARE, "r"), SCHEMA, "is not a group"),
    "an empty tree": (lambda g: tt.save(xr.DataTree(), "r"), SCHEMA, "a run has groups"),
    "a dict": (lambda g: tt.save({"a": g.answers}, "r"), SCHEMA, "a dict is not a run"),
    "an array": (lambda g: tt.save(g.answers.margin, "r"), SCHEMA, "a DataArray is not a run"),
    "a strange place": (lambda g: tt.save(g.run, "nope://x"), STORE, "nope://x cannot be used"),
}


@pytest.mark.parametrize("name", SAVED)
def test_saving(name: str, given: SimpleNamespace, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    refused(SAVED[name], given)
    assert not list(tmp_path.iterdir())


def schema(store: Path, value: Any) -> None:
    attribute(store, "twotower_schema", value)


def attribute(store: Path, name: str, value: Any) -> None:
    about = json.loads((store / "zarr.json").read_text())
    about["attributes"][name] = value
    (store / "zarr.json").write_text(json.dumps(about))


def a_file(store: Path) -> None:
    shutil.rmtree(store)
    store.write_bytes(b"not a store")


def emptied(store: Path) -> None:
    shutil.rmtree(store)
    store.mkdir()


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def foreign(store: Path) -> None:
    shutil.rmtree(store)
    xr.Dataset({"x": ("y", [1, 2])}).to_zarr(store, consolidated=False)


DAMAGE = {
    "gone": (shutil.rmtree, "there is no store at"),
    "a file": (a_file, "cannot be read as a Zarr store"),
    "an empty folder": (emptied, "cannot be read as a Zarr store"),
    "foreign": (foreign, "is a Zarr store, but not a twotower run"),
    "older": (lambda store: schema(store, 0), "is not a run that this version reads"),
    "newer": (lambda store: schema(store, 999), "is not a run that this version reads"),
    "a text for a schema": (lambda store: schema(store, "1"), "is not a run that this version"),
    "cut root": (lambda store: cut(store / "zarr.json"), "cannot be read as a Zarr store"),
    "cut group": (lambda store: cut(store / "qk" / "zarr.json"), "cannot be read as a Zarr store"),
    "cut array": (lambda store: cut(store / "qk" / "score" / "zarr.json"), "cannot be read"),
    "no root": (lambda store: (store / "zarr.json").unlink(), "cannot be read as a Zarr store"),
    "an array lost": (lambda store: shutil.rmtree(store / "qk" / "score"), "lacks the variable"),
    "a group lost": (lambda store: shutil.rmtree(store / "qk"), "groups qk are missing"),
    "a list of groups": (lambda store: attribute(store, "groups", "{"), "is not a run that this"),
    "groups a number": (lambda store: attribute(store, "groups", 3), "is not a run that this"),
    "parts": (lambda store: attribute(store, "twotower_parts", "[1"), "is not a run that this"),
}


@pytest.fixture(scope="module")
def saved(given: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(tt.save(given.run, tmp_path_factory.mktemp("saved") / "run.zarr"))


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_stores(name: str, saved: Path, tmp_path: Path) -> None:
    damage, message = DAMAGE[name]
    store = tmp_path / "run.zarr"
    shutil.copytree(saved, store)
    damage(store)
    refused((lambda: tt.open(store), STORE, message))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read and write everything")
def test_places_that_may_not_be_used(given: SimpleNamespace, saved: Path, tmp_path: Path) -> None:
    store = tmp_path / "run.zarr"
    shutil.copytree(saved, store)
    (store / "zarr.json").chmod(0)
    refused((lambda: tt.open(store), STORE, "cannot be read"))
    tmp_path.chmod(0o500)
    refused((lambda: tt.save(given.run, tmp_path / "more.zarr"), STORE, "cannot be written"))
    tmp_path.chmod(0o700)
