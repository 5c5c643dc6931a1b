"""Runs come back as they were saved, and what is no run is refused untouched."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
import zarr

import twotower as tt


@pytest.fixture(scope="module")
def run(llama: tt.Model, prompts: tt.Prompts) -> xr.DataTree:
    return tt.analyze(llama, prompts)


@pytest.fixture
def stored(run: xr.DataTree, tmp_path: Path) -> Path:
    return tt.save(run, tmp_path / "run.zarr")


def test_round_trip(run: xr.DataTree, stored: Path) -> None:
    again = tt.open(stored)
    assert set(again.children) == set(run.children)
    for name, node in run.children.items():
        xr.testing.assert_identical(
            again[name].to_dataset(inherit=False).load(), node.to_dataset(inherit=False)
        )
    assert again.attrs == run.attrs


def test_opens_with_plain_xarray(run: xr.DataTree, stored: Path) -> None:
    tree = xr.open_datatree(stored, engine="zarr", consolidated=False)
    attention = tree.qk.attention.sel(layer=1, head=0)
    assert float(attention.where(attention.role == "label").sum()) > 0
    assert tree["prompts"]["token"].values.tolist() == run["prompts"]["token"].values.tolist()


def test_is_zarr_3(stored: Path) -> None:
    group = zarr.open_group(stored, mode="r")
    assert group.metadata.zarr_format == 3


def test_a_single_dataset(llama: tt.Model, prompts: tt.Prompts, tmp_path: Path) -> None:
    answers = tt.predict(llama, prompts)
    tt.save(answers, tmp_path / "one.zarr")
    again = tt.open(tmp_path / "one.zarr")
    assert list(again.children) == ["predictions"]
    np.testing.assert_array_equal(again["predictions"]["margin"].values, answers["margin"].values)


def test_texts_of_every_script_survive(llama: tt.Model, tmp_path: Path) -> None:
    task = tt.Task(
        "scripts", {"a": ["naïve café", "日本語", "😀 ok"], "b": ["שלום", "x\u0301y", "b"]}
    )
    prompts = tt.build_prompts(llama, task, shots=1, n=4)
    tt.save(tt.analyze(llama, prompts, measures=("predictions",)), tmp_path / "s.zarr")
    again = tt.open(tmp_path / "s.zarr")
    assert again["prompts"]["text"].values.tolist() == [p.text for p in prompts]


def test_does_not_overwrite_unless_told(run: xr.DataTree, stored: Path) -> None:
    with pytest.raises(tt.errors.StoreError, match="exists already"):
        tt.save(run, stored)
    tt.save(run, stored, overwrite=True)
    tt.open(stored)
    assert [p.name for p in stored.parent.iterdir()] == ["run.zarr"]


def test_never_removes_what_is_no_run(run: xr.DataTree, tmp_path: Path) -> None:
    folder = tmp_path / "thesis"
    folder.mkdir()
    (folder / "chapter.tex").write_text("years of work")
    with pytest.raises(tt.errors.StoreError, match="cannot be read as a Zarr store"):
        tt.save(run, folder, overwrite=True)
    assert (folder / "chapter.tex").read_text() == "years of work"


def test_foreign_store(tmp_path: Path) -> None:
    xr.Dataset({"t": ("x", np.arange(3))}).to_zarr(tmp_path / "f.zarr", consolidated=False)
    with pytest.raises(tt.errors.StoreError, match="not a twotower run"):
        tt.open(tmp_path / "f.zarr")


def test_missing_store(tmp_path: Path) -> None:
    with pytest.raises(tt.errors.StoreError, match="there is no store"):
        tt.open(tmp_path / "none.zarr")


def test_damaged_store(stored: Path) -> None:
    (stored / "qk" / "zarr.json").write_text("{not json")
    with pytest.raises(tt.errors.StoreError, match="cannot be read"):
        tt.open(stored)


def test_incomplete_store(stored: Path) -> None:
    shutil.rmtree(stored / "qk" / "score")
    with pytest.raises(tt.errors.StoreError, match="lacks the variable 'score'"):
        tt.open(stored)


def test_unwritable_place(run: xr.DataTree, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(tt.errors.StoreError, match="cannot be written"):
        tt.save(run, tmp_path / "file" / "run.zarr")


def test_an_ill_formed_run_is_not_written(run: xr.DataTree, tmp_path: Path) -> None:
    wrong = run.copy()
    wrong["qk"] = xr.DataTree(run["qk"].to_dataset(inherit=False).drop_vars("attention"))
    with pytest.raises(tt.errors.SchemaError, match="lacks the variable 'attention'"):
        tt.save(wrong, tmp_path / "run.zarr")
    assert not list(tmp_path.iterdir())
