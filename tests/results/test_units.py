"""A store that is filled unit by unit: what it holds, who writes what, and what is missing."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import not_finite
import numpy as np
import pytest
import xarray as xr
import zarr

import twotower as tt
from twotower.errors import StoreError
from twotower.measures.analyze import choose_measures, run_datasets
from twotower.measures.collect import collect
from twotower.results import measured_prompts
from twotower.results.units import DONE, FAILED, Unit, UnitStore, plan_units, report_missing

N, SIZE = 6, 4


@pytest.fixture(scope="module")
def whole(llama: tt.Model, prompts: tt.Prompts) -> Any:
    """Datasets by group, and the root's attributes."""
    return run_datasets(
        llama, prompts, choose_measures(), collect(llama, prompts, choose_measures())
    )


@pytest.fixture(scope="module")
def fresh(whole: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store in which no unit is done."""
    path = tmp_path_factory.mktemp("fresh") / "run.zarr"
    created = UnitStore(path, patience=0.3)
    created.create({"": whole}, plan_units({"": N}, SIZE), SIZE, {"configuration": "{}"})
    return path


@pytest.fixture
def store(tmp_path: Path, fresh: Path) -> UnitStore:
    return UnitStore(Path(shutil.copytree(fresh, tmp_path / "run.zarr")), patience=0.3)


def some(whole: Any, unit: Unit) -> dict[str, xr.Dataset]:
    return {
        name: dataset.isel(prompt=slice(unit.start, unit.stop))
        for name, dataset in whole[0].items()
    }


def test_units_are_blocks_of_prompts() -> None:
    units = plan_units({"a": 5, "b": 2}, 2)
    assert units == [(0, "a", 0, 2), (1, "a", 2, 4), (2, "a", 4, 5), (3, "b", 0, 2)]
    assert str(units[1]) == "unit 1 (a, prompts 2 to 3)"


def test_is_whole_from_the_start(store: UnitStore, whole: Any) -> None:
    """Everything but values is there: shapes, coordinates, attributes, the prompts."""
    run = tt.open(store.place.path)
    for name, dataset in whole[0].items():
        found = run[name].to_dataset(inherit=False)
        assert dict(found.sizes) == dict(dataset.sizes)
        for key, coordinate in dataset.coords.items():
            np.testing.assert_array_equal(found[key].values.astype(object), coordinate.values)
        for key, array in dataset.data_vars.items():
            assert found[key].attrs == array.attrs
            values = found[key].values
            if name == "prompts":
                np.testing.assert_array_equal(values.astype(object), array.values)
            elif values.dtype.kind == "f":
                assert np.isnan(values).all()
            else:
                assert (values == "").all()
        if name != "prompts":
            assert not found["measured"].values.any()


def test_units_fill_it(store: UnitStore, whole: Any) -> None:
    first, second = store.units()
    store.write(second, some(whole, second))
    store.mark(second, DONE, seconds=2.0, finished=3.0, worker="here", error="")
    run = tt.open(store.place.path)
    assert run.qk.measured.values.tolist() == [False] * 4 + [True] * 2
    assert run.predictions.correct.dtype.kind == "f"  # NaN where missing
    expected = whole[0]["predictions"].correct.values[4:]
    np.testing.assert_array_equal(run.predictions.correct.values[4:], expected)
    assert np.isnan(run.predictions.correct.values[:4]).all()
    assert float(run.predictions.correct.mean()) == expected.mean()
    assert run.units.state.values.tolist() == ["", DONE]
    assert len(tt.in_context_heads(run, 3)) == 3
    store.write(first, some(whole, first))
    store.mark(first, DONE)
    run = tt.open(store.place.path)
    for name, dataset in whole[0].items():
        found = run[name].to_dataset(inherit=False).compute()
        assert "measured" not in found.coords
        for key, array in dataset.data_vars.items():
            np.testing.assert_array_equal(found[key].values.astype(array.dtype), array.values)


def test_values_are_read_when_they_are_used(store: UnitStore) -> None:
    run = tt.open(store.place.path)
    assert run.qk.score.chunks[0] == (4, 2)
    assert run.ov.label_logit.mean("position").chunks is not None


def test_no_chunk_belongs_to_two_units(store: UnitStore, whole: Any) -> None:
    before = {path for path in store.place.path.rglob("*") if path.is_file()}
    written = []
    for unit in store.units():
        stamps = {path: path.stat().st_mtime_ns for path in before}
        store.write(unit, some(whole, unit))
        now = {path for path in store.place.path.rglob("*") if path.is_file()}
        written.append(now - before)
        assert all(path.stat().st_mtime_ns == stamp for path, stamp in stamps.items())
        before = now
    assert all(written)
    names = {path.parent.name for path in written[0]}
    assert names == {path.parent.name for path in written[1]}
    assert len(written[0]) == len(written[1])


def test_data_comes_before_the_mark(store: UnitStore, whole: Any) -> None:
    """A power cut between them leaves a unit that is missing, and is measured again."""
    unit = store.units()[0]
    store.write(unit, some(whole, unit))
    assert store.states() == ["", ""]
    assert not tt.open(store.place.path).qk.measured.values.any()


def test_data_is_on_the_disk_before_the_mark(
    store: UnitStore, whole: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushed: list[str] = []
    sync = os.fsync

    def watch(handle: int) -> None:
        flushed.append(os.readlink(f"/proc/self/fd/{handle}"))
        sync(handle)

    monkeypatch.setattr(os, "fsync", watch)
    before = {path for path in store.place.path.rglob("*") if path.is_file()}
    unit = store.units()[0]
    store.write(unit, some(whole, unit))
    new = {path for path in store.place.path.rglob("*") if path.is_file()} - before
    assert new
    assert {str(path) for path in new} <= set(flushed)


def test_shorter_prompts_are_padded(store: UnitStore, llama: tt.Model, prompts: Any) -> None:
    """A unit's own prompts may all be shorter than the run's longest."""
    short = prompts[:SIZE]
    cut = prompts.n_positions - 1
    unit = store.units()[0]
    groups, _ = run_datasets(
        llama, short, choose_measures(), collect(llama, short, choose_measures())
    )
    narrow = {
        name: dataset.isel(position=slice(1, None)) if name == "qk" else dataset
        for name, dataset in groups.items()
    }
    assert narrow["qk"].sizes["position"] <= cut
    store.write(unit, narrow)
    values = tt.open(store.place.path).qk.score.values[:SIZE]
    lost = prompts.n_positions - narrow["qk"].sizes["position"]
    assert np.isnan(values[..., :lost]).all()
    np.testing.assert_array_equal(values[..., lost:], narrow["qk"].score.values)


def test_damage_is_noticed(store: UnitStore, whole: Any) -> None:
    """Chunks carry a checksum."""
    unit = store.units()[0]
    store.write(unit, some(whole, unit))
    store.mark(unit, DONE)
    (path,) = (store.place.path / "qk" / "score").glob("c.0.*")
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    with pytest.raises(RuntimeError, match="[Cc]hecksum|decompression"):
        tt.open(store.place.path).qk.score.values[0]


def test_what_killed_writers_left(store: UnitStore) -> None:
    left = store.place.path / "qk" / "score" / "c.0.0.0.0.1a2b.partial"
    left.write_bytes(b"half")
    store.clean()
    assert not left.exists()
    assert store.states() == ["", ""]


def test_another_that_came_into_being_meanwhile(store: UnitStore, whole: Any) -> None:
    units = store.units()
    store.mark(units[0], DONE)
    with pytest.raises(StoreError, match="exists already"):
        store.create({"": whole}, units, SIZE, {})
    assert store.states() == [DONE, ""]
    store.create({"": whole}, units, SIZE, {}, overwrite=True)
    assert store.states() == ["", ""]
    assert [path.name for path in store.place.path.parent.iterdir()] == ["run.zarr"]


def test_several_parts(tmp_path: Path, whole: Any) -> None:
    store = UnitStore(tmp_path / "run.zarr")
    units = plan_units({"a": N, "b": N}, SIZE)
    store.create({"a": whole, "b": whole}, units, SIZE, {})
    store.write(units[2], some(whole, units[2]))
    store.mark(units[2], DONE)
    run = tt.open(store.place.path)
    assert set(run.children) == {"a", "b", "units"}
    assert not run["a"].qk.measured.values.any()
    assert run["b/qk"].measured.values.tolist() == [True] * 4 + [False] * 2
    expected = whole[0]["qk"].attention.values[:4]
    np.testing.assert_array_equal(run["b"].qk.attention.values[:4], expected)


def test_a_store_that_refuses_for_a_while(
    store: UnitStore, whole: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, refused = xr.Dataset.to_zarr, []

    def full(self: Any, *arguments: Any, **options: Any) -> Any:
        if len(refused) < 2:
            refused.append(1)
            raise OSError(28, "No space left on device")
        return write(self, *arguments, **options)

    monkeypatch.setattr(xr.Dataset, "to_zarr", full)
    unit = store.units()[0]
    store.patience = 5
    store.write(unit, some(whole, unit))
    assert len(refused) == 2
    values = tt.open(store.place.path).qk.score.values[:SIZE]
    np.testing.assert_array_equal(values, whole[0]["qk"].score.values[:SIZE])
    refused.clear()
    store.patience = 0
    with pytest.raises(StoreError, match="cannot be written .*No space left on device"):
        store.write(unit, some(whole, unit))


def test_what_is_no_such_store(tmp_path: Path, store: UnitStore) -> None:
    with pytest.raises(StoreError, match="there is no store"):
        UnitStore(tmp_path / "nothing").ledger()
    zarr.create_group(tmp_path / "foreign", zarr_format=3)
    with pytest.raises(StoreError, match="not a run measured in units"):
        UnitStore(tmp_path / "foreign").states()
    store.place.remove()
    with pytest.raises(StoreError):
        store.mark(Unit(0, "", 0, 4), DONE)
    assert not store.place.holds()


def test_failures_are_written_down(store: UnitStore) -> None:
    store.mark(store.units()[1], FAILED, error="it was too long", finished=time.time())
    ledger = store.ledger()
    assert ledger.state.values.tolist() == ["", FAILED]
    assert ledger.error.values.tolist() == ["", "it was too long"]


def test_scores_are_marked_once_they_are_whole(
    store: UnitStore, whole: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for unit in store.units():
        store.write(unit, some(whole, unit))
        store.mark(unit, DONE)
    run = tt.open(store.place.path)
    scores = tt.two_tower_scores(run)

    def dies(name: str, value: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(store, "_set", dies)
    with pytest.raises(KeyboardInterrupt):
        store.write_scores("", scores, N)
    assert store.scored() == {}
    monkeypatch.undo()
    store.write_scores("", scores, N)
    assert store.scored() == {"": N}


def test_who_drives(store: UnitStore) -> None:
    assert store.driver() == {}
    store.beat({"host": "a", "process": 3})
    assert store.driver() == {"host": "a", "process": 3}
    assert json.loads(tt.open(store.place.path).units.driver.item())["host"] == "a"
    store.beat(None)
    assert store.driver() == {}


def test_prompts_that_are_not_finite(tmp_path: Path) -> None:
    """They are missing in a run's store as they are in a run that is measured at once."""
    model, prompts = not_finite.model(), not_finite.prompts()
    bad, n = not_finite.holds(prompts), len(prompts)
    with not_finite.unwarned():
        found = collect(model, prompts, choose_measures())
        whole = run_datasets(model, prompts, choose_measures(), found)
        once = tt.analyze(model, prompts)
    store = UnitStore(tmp_path / "run.zarr")
    store.create({"": whole}, plan_units({"": n}, SIZE), SIZE, {"configuration": "{}"})
    units = store.units()
    for unit in units[:-1]:
        groups = some(whole, unit)
        store.write(unit, groups)
        store.mark(unit, DONE, not_finite=report_missing(unit, groups))
    run = tt.open(store.place.path)
    done = units[-1].start
    assert run.predictions.measured.values.tolist() == [i < done for i in range(n)]
    kept = measured_prompts(run.predictions)
    np.testing.assert_array_equal(kept.prompt, np.flatnonzero(~bad[:done]))
    assert kept.correct.dtype == bool
    groups = some(whole, units[-1])
    store.write(units[-1], groups)
    store.mark(units[-1], DONE, not_finite=report_missing(units[-1], groups))
    run = tt.open(store.place.path)
    assert run.attrs["not_finite"] == bad.sum()
    for name in ("predictions", "effects", "qk", "ov", "attribution"):
        opened = run[name].to_dataset(inherit=False).compute()
        not_finite.is_missing(opened, bad)
        for key, array in once[name].data_vars.items():
            expected = array.values
            if expected.dtype.kind == "f":
                np.testing.assert_allclose(opened[key], expected, rtol=0.02, atol=0.02)
            else:
                assert opened[key].values.tolist() == expected.tolist()
    for name, values in once["scores"].data_vars.items():
        np.testing.assert_allclose(tt.two_tower_scores(run)[name], values, atol=0.02)
    # A run that is saved whole comes back as it was.
    again = tt.open(tt.save(once, tmp_path / "whole.zarr"))
    not_finite.is_missing(again.predictions.to_dataset(inherit=False).compute(), bad)
    assert again.tt.heads(3) == run.tt.heads(3) == once.tt.heads(3)


def test_a_store_of_an_older_version_opens(store: UnitStore, whole: Any) -> None:
    """Its ledger does not say what is not finite; going on with it adds the column."""
    shutil.rmtree(store.place.path / "units" / "not_finite")
    for unit in store.units()[:1]:
        store.write(unit, some(whole, unit))
    assert tt.open(store.place.path).attrs["not_finite"] == 0
    store.complete()
    store.mark(store.units()[0], DONE, not_finite=json.dumps({"prompts": [1], "values": {}}))
    run = tt.open(store.place.path)
    assert run.attrs["not_finite"] == 1
    assert measured_prompts(run.effects)["prompt"].values.tolist() == [0, 2, 3]
