"""Runs: the same numbers whatever carries them out, nothing lost, nothing overwritten."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import not_finite
import numpy as np
import psutil
import pytest
import torch
import xarray as xr
import zarr
from command import run as command
from small_run import ALL, chunks, small
from transformers import AutoModelForCausalLM

import twotower as tt
from twotower.cli.status import status_of
from twotower.errors import InputError, StoreError
from twotower.results.units import UnitStore
from twotower.runs import worker as workers
from twotower.runs.claim import Claim
from twotower.runs.configuration import Configuration
from twotower.runs.engines import LocalEngine
from twotower.runs.run import carry_out

pytestmark = pytest.mark.usefixtures("loaded_once")

WHOLE = {"n": 8, "measures": ALL}
"""Four units of all measures."""


def quiet(config: Configuration) -> Any:
    return carry_out(config, log=lambda line: None)


@pytest.fixture(scope="module")
def reference(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run."""
    out = tmp_path_factory.mktemp("reference") / "run.zarr"
    quiet(small(checkpoint, out))
    return out


@pytest.fixture(scope="module")
def whole(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run of all measures."""
    out = tmp_path_factory.mktemp("whole") / "run.zarr"
    quiet(small(checkpoint, out, **WHOLE))
    return out


def close(
    one: xr.DataTree, other: xr.DataTree, ignoring: tuple[str, ...] = ("created", "proof")
) -> None:
    """Same groups, attributes, coordinates, and values to 1e-5."""
    groups = set(one.children) - {"units"}
    assert groups == set(other.children) - {"units"}
    for name in groups:
        a, b = one[name].to_dataset(inherit=False), other[name].to_dataset(inherit=False)
        assert set(a.data_vars) == set(b.data_vars)
        assert {**a.attrs, **dict.fromkeys(ignoring)} == {**b.attrs, **dict.fromkeys(ignoring)}
        for key in [*a.coords, *a.data_vars]:
            x, y = a[key].values, b[key].values
            assert a[key].attrs == b[key].attrs
            if x.dtype.kind == "f":
                np.testing.assert_array_equal(np.isnan(x), np.isnan(y))
                scale = np.nanmax(np.abs(y), initial=1e-30)
                assert np.nanmax(np.abs(x - y), initial=0) <= 1e-5 * scale, (name, key)
            else:
                np.testing.assert_array_equal(x.astype(object), y.astype(object))


def test_equals_what_is_measured_in_one_piece(whole: Path, checkpoint: Path) -> None:
    config = small(checkpoint, whole, **WHOLE)
    model = config.load_model()
    prompts = config.build_prompts(model, config.load_task())
    close(tt.open(whole), tt.analyze(model, prompts))


@pytest.mark.parametrize(
    "settings",
    [
        {"batch_size": None, "unit_size": 5},
        pytest.param({"batch_size": 1}, marks=pytest.mark.slow),
        pytest.param({"batch_size": None}, marks=pytest.mark.slow),
        pytest.param({"unit_size": 5}, marks=pytest.mark.slow),
    ],
)
def test_does_not_depend_on_how_it_is_cut(
    settings: dict[str, Any], whole: Path, checkpoint: Path, tmp_path: Path
) -> None:
    config = small(checkpoint, tmp_path / "run.zarr", **WHOLE, **settings)
    close(quiet(config).run, tt.open(whole))


def test_label_positions_alone(checkpoint: Path, tmp_path: Path) -> None:
    config = small(checkpoint, tmp_path / "run.zarr", keep="labels", n=4, measures=ALL)
    model = config.load_model()
    prompts = config.build_prompts(model, config.load_task())
    close(quiet(config).run, tt.analyze(model, prompts, keep="labels"))


def test_the_same_bits_again(reference: Path, checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "run.zarr"
    quiet(small(checkpoint, out))
    assert chunks(out) == chunks(reference)


class Stopped:
    """Lets something happen within a unit, once so many are done."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, after: int, then: Callable[[], None]):
        self.measured: list[int] = []
        call = workers.Worker.__call__

        def watched(worker: workers.Worker, unit: Any) -> Any:
            if len(self.measured) == after:
                then()
            report = call(worker, unit)
            self.measured.append(unit.number)
            return report

        monkeypatch.setattr(workers.Worker, "__call__", watched)


def test_goes_on_where_it_stopped(
    reference: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop() -> None:
        raise KeyboardInterrupt

    out = tmp_path / "run.zarr"
    first = Stopped(monkeypatch, 2, stop)
    with pytest.raises(KeyboardInterrupt):
        quiet(small(checkpoint, out))
    status = status_of(out)
    assert (status.done, status.missing, status.running, status.driver) == (2, 4, 0, "")
    assert tt.open(out).qk.measured.values.tolist() == [True] * 4 + [False] * 8
    monkeypatch.undo()
    second = Stopped(monkeypatch, -1, stop)
    # Engine, batch, threads and where it runs may change; the numbers are the same.
    finished = quiet(small(checkpoint, out, batch_size=2, threads=1, device_map="cpu"))
    assert finished.before == 2
    assert first.measured + second.measured == [0, 1, 2, 3, 4, 5]
    assert chunks(out) == chunks(reference)
    close(tt.open(out), tt.open(reference))
    third = Stopped(monkeypatch, 0, stop)
    assert quiet(small(checkpoint, out)).before == 6
    assert third.measured == []
    assert chunks(out) == chunks(reference)


def test_other_weights_in_the_same_folder_are_refused(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop() -> None:
        raise KeyboardInterrupt

    folder, out = tmp_path / "model", tmp_path / "run.zarr"
    shutil.copytree(checkpoint, folder)
    Stopped(monkeypatch, 2, stop)
    with pytest.raises(KeyboardInterrupt):
        quiet(small(folder, out))
    monkeypatch.undo()
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        next(model.parameters())[0] += 1
    model.save_pretrained(folder)
    with pytest.raises(StoreError, match="another weights hash"):
        quiet(small(folder, out))


def test_scores_that_were_not_written_to_the_end(
    whole: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped after the last unit, while scores replace those that were there."""
    out = tmp_path / "run.zarr"

    def stop(store: UnitStore, part: str, scores: Any, n: int) -> None:
        (store.place.path / "scores" / "qk_auc" / "c" / "0" / "0").unlink(missing_ok=True)
        raise KeyboardInterrupt

    config = small(checkpoint, out, **WHOLE)
    with monkeypatch.context() as patch:
        patch.setattr(UnitStore, "write_scores", stop)
        with pytest.raises(KeyboardInterrupt):
            quiet(config)
    assert status_of(out).done == 4
    quiet(config)
    assert chunks(out) == chunks(whole)


def test_ctrl_c_lets_the_unit_end(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    before = signal.getsignal(signal.SIGINT)
    seen = Stopped(monkeypatch, 1, lambda: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        carry_out(small(checkpoint, tmp_path / "run.zarr"), log=said.append)
    assert seen.measured == [0, 1]
    assert status_of(tmp_path / "run.zarr").done == 2
    assert any("Ctrl-C again stops at once" in line for line in said)
    assert signal.getsignal(signal.SIGINT) is before


def test_ctrl_c_twice_stops_at_once(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def twice() -> None:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)

    seen = Stopped(monkeypatch, 1, twice)
    with pytest.raises(KeyboardInterrupt):
        quiet(small(checkpoint, tmp_path / "run.zarr"))
    assert seen.measured == [0]
    assert status_of(tmp_path / "run.zarr").done == 1


def test_a_unit_that_fails_is_tried_three_times(
    whole: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    tries: list[int] = []
    call = workers.Worker.__call__

    def fails(worker: workers.Worker, unit: Any) -> Any:
        if unit.number in (1, 3):
            tries.append(unit.number)
            if unit.number == 1 or len(tries) < 3:
                raise RuntimeError("a bad day")
        return call(worker, unit)

    monkeypatch.setattr(workers.Worker, "__call__", fails)
    out = tmp_path / "run.zarr"
    given = ["--model", checkpoint, "--output", out, "--n", 8, "--unit-size", 2, "--shots", 2]
    given += ["--batch-size", 2, "--threads", 1]
    assert command("analyze", *given) == 1
    printed = capsys.readouterr()
    assert "1 units failed (twotower status" in printed.err
    assert "RuntimeError: a bad day" in printed.out
    assert sorted(tries) == [1, 1, 1, 3, 3]
    status = status_of(out)
    assert (status.done, status.failed, status.missing) == (3, 1, 0)
    assert status.errors == {"unit 1 (prompts 2 to 3)": "RuntimeError: a bad day"}
    run = tt.open(out)
    assert run.qk.measured.values.tolist() == [True] * 2 + [False] * 2 + [True] * 4
    # Scores are those of the prompts that were measured.
    rest = tt.open(whole)
    some = {name: rest[name].isel(prompt=[0, 1, *range(4, 8)]) for name in ("qk", "ov", "effects")}
    expected = tt.two_tower_scores(xr.DataTree.from_dict(some))
    np.testing.assert_allclose(run.scores.qk_auc.values, expected.qk_auc.values)
    np.testing.assert_allclose(
        run.scores.margin_drop.values, expected.margin_drop.values, atol=1e-6
    )
    monkeypatch.undo()
    assert command("analyze", *given) == 0
    assert chunks(out) == chunks(whole)
    close(tt.open(out), tt.open(whole))


def test_several_models_tasks_and_seeds(checkpoint: Path, reference: Path, tmp_path: Path) -> None:
    about = {"n": 3, "measures": ("predictions",)}
    config = small(
        checkpoint, tmp_path / "run.zarr", task=("animals-cities", "topic"), seed=(0, 1), **about
    )
    run = quiet(config).run
    names = {f"tiny.{task}.seed-{seed}" for task in config.task for seed in config.seed}
    assert set(run.children) == {*names, "units"}
    model = config.load_model()
    for name, part in config.parts.items():
        alone = small(checkpoint, tmp_path / "no.zarr", task=part.task, seed=part.seed, **about)
        prompts = alone.build_prompts(model, alone.load_task())
        close(run[name], tt.analyze(model, prompts, measures=about["measures"]))
    assert status_of(tmp_path / "run.zarr").parts == dict.fromkeys(config.parts, (2, 2))
    # What came before stays where a run has only one of each.
    assert "qk" in tt.open(reference).children


# ---- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"shots": 3}, "shots was 2, is now 3"),
        ({"unit_size": 3, "n": 10}, "n was 12, is now 10; unit_size was 2, is now 3"),
        ({"seed": (0, 1)}, r"seed was 0, is now \[0, 1\]"),
        ({"measures": ("qk",)}, r"measures was .* is now \"qk\""),
        ({"dtype": "bfloat16"}, 'dtype was null, is now "bfloat16"'),
    ],
)
def test_another_configuration_is_refused(
    settings: dict[str, Any], message: str, reference: Path, checkpoint: Path
) -> None:
    before = chunks(reference)
    with pytest.raises(StoreError, match=message):
        quiet(small(checkpoint, reference, **settings))
    assert chunks(reference) == before


def test_another_version_is_told(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    provenance = import_module("twotower.results.provenance")  # the package has a function so named
    out = tmp_path / "run.zarr"
    quiet(small(checkpoint, out, n=2))
    about = {**provenance.versions(), "torch": "9.9"}
    monkeypatch.setattr(provenance, "versions", lambda: about)
    said: list[str] = []
    carry_out(small(checkpoint, out, n=2), log=said.append)
    assert any(line.startswith("started with torch") and "now 9.9" in line for line in said)


def test_overwrite_replaces_it(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "run.zarr"
    quiet(small(checkpoint, out, n=4))
    quiet(small(checkpoint, out, n=2, overwrite=True))
    assert tt.open(out).qk.sizes["prompt"] == 2
    assert [path.name for path in tmp_path.iterdir()] == ["run.zarr"]


def test_a_changed_model_is_refused(checkpoint: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """Settings are the same, what they name is not."""
    import shutil

    copy, out = tmp_path / "tiny", tmp_path / "run.zarr"
    shutil.copytree(checkpoint, copy)
    Stopped(monkeypatch, 1, lambda: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        quiet(small(copy, out))
    monkeypatch.undo()
    tokenizer = json.loads((copy / "tokenizer.json").read_text())
    tokenizer["added_tokens"].append(
        {**tokenizer["added_tokens"][0], "id": 999, "content": "<new>"}
    )
    (copy / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(StoreError, match="was started with another tokenizer hash"):
        quiet(small(copy, out))


def test_foreign_older_and_truncated_stores(
    checkpoint: Path, reference: Path, tmp_path: Path
) -> None:
    import shutil

    foreign = tmp_path / "foreign.zarr"
    zarr.create_group(foreign, zarr_format=3)
    (foreign / "mine").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(StoreError, match="not a twotower run"):
            quiet(small(checkpoint, foreign, overwrite=overwrite))
    assert (foreign / "mine").read_text() == "mine"

    older = tmp_path / "older.zarr"
    shutil.copytree(reference, older)
    about = json.loads((older / "zarr.json").read_text())
    about["attributes"]["twotower_schema"] = 0
    (older / "zarr.json").write_text(json.dumps(about))
    with pytest.raises(StoreError, match="schema 0"):
        quiet(small(checkpoint, older))

    truncated = tmp_path / "truncated.zarr"
    shutil.copytree(reference, truncated)
    shutil.rmtree(truncated / "units")
    with pytest.raises(StoreError, match="is incomplete"):
        quiet(small(checkpoint, truncated))
    text = (reference / "zarr.json").read_text()
    (truncated / "zarr.json").write_text(text[: len(text) // 2])
    with pytest.raises(StoreError, match="cannot be read as a Zarr store"):
        quiet(small(checkpoint, truncated))


def test_a_folder_that_cannot_be_written(
    checkpoint: Path, reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # the tests may run as root
    for place in (tmp_path / "new" / "run.zarr", reference):
        with pytest.raises(StoreError, match="not a writable folder"):
            quiet(small(checkpoint, place))
    assert not list(tmp_path.iterdir())


def test_a_store_that_refuses_stops_the_run(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk: the run ends with a clear state, and goes on once there is room."""
    out = tmp_path / "run.zarr"
    write, calls = UnitStore._region, []

    def full(self: Any, *arguments: Any) -> None:
        calls.append(1)
        if len(calls) > 3:
            raise OSError(28, "No space left on device")
        write(self, *arguments)

    monkeypatch.setattr(UnitStore, "_region", full)
    with pytest.raises(StoreError, match="No space left on device"):
        quiet(small(checkpoint, out, patience=0.2))
    status = status_of(out)
    assert (status.done, status.missing, status.driver) == (1, 5, "")
    monkeypatch.undo()
    assert quiet(small(checkpoint, out)).before == 1


def test_two_drivers(checkpoint: Path, reference: Path, tmp_path: Path, monkeypatch: Any) -> None:
    store = UnitStore(reference)
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])

    about = {
        "host": socket.gethostname(),
        "process": other.pid,
        "started": psutil.Process(other.pid).create_time(),
        "beat": 0.0,
        "running": [],
    }
    try:
        store.beat(about)
        with pytest.raises(StoreError, match=f"is being measured by process {other.pid}"):
            quiet(small(checkpoint, reference))
    finally:
        other.kill()
        other.wait()
    quiet(small(checkpoint, reference))  # it is dead
    store.beat({**about, "host": "elsewhere", "beat": time.time()})
    with pytest.raises(StoreError, match="on elsewhere"):
        quiet(small(checkpoint, reference))
    store.beat({**about, "host": "elsewhere", "beat": time.time() - 100})
    quiet(small(checkpoint, reference))
    assert store.driver() == {}


def test_signs_of_life(reference: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("twotower.runs.claim.EVERY", 0.01)
    store, engine = UnitStore(reference), LocalEngine(lambda: None)
    with Claim(store, engine):
        first = store.driver()["beat"]
        engine.slots["this process"] = store.units()[3]
        end = time.monotonic() + 10
        while store.driver()["running"] != [3] and time.monotonic() < end:
            time.sleep(0.01)
        assert store.driver()["running"] == [3]
        assert store.driver()["beat"] > first
        status = status_of(reference)
        assert status.driver.endswith(f":{os.getpid()}")
    assert store.driver() == {}


def test_status_while_it_goes_on(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, found = tmp_path / "run.zarr", []
    monkeypatch.setattr("twotower.runs.claim.EVERY", 0.02)

    def look() -> None:
        end = time.monotonic() + 10
        while not found or found[-1].running != 1 or found[-1].done != 3:
            found.append(status_of(out))
            assert time.monotonic() < end

    Stopped(monkeypatch, 3, lambda: _in_thread(look))
    quiet(small(checkpoint, out))
    assert (found[-1].done, found[-1].running, found[-1].missing) == (3, 1, 2)
    assert found[-1].prompts_done == 6
    assert found[-1].prompts_per_second > 0
    assert found[-1].seconds_left > 0
    end = status_of(out)
    assert (end.done, end.running, end.missing, end.seconds_left) == (6, 0, 0, None)


def _in_thread(job: Callable[[], None]) -> None:
    thread = threading.Thread(target=job)
    thread.start()
    thread.join()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["--workers", "2"], "--workers is for --engine ray"),
        (["--engine", "ray", "--workers", "0"], "workers=0"),
        (["--engine", "slurm"], "slurm"),
        (["--unit-size", "0"], "unit_size=0"),
        (["--seed", "1", "--seed", "1"], "seed"),
        (["--output", "nowhere://x"], "nowhere://x"),
    ],
)
def test_settings_that_make_no_sense(settings: list[str], message: str, capsys: Any) -> None:
    assert command("analyze", *settings) == 2
    printed = capsys.readouterr().err
    assert message in printed
    assert printed.count("\n") == 1


def test_configurations() -> None:
    config = Configuration(model=("a/b", "c"), seed=[3, 4])
    assert list(config.parts) == [f"{m}.animals-cities.seed-{s}" for m in "bc" for s in (3, 4)]
    assert config.hash == Configuration(model=("a/b", "c"), seed=(3, 4), batch_size=9).hash
    assert config.hash != Configuration(model=("a/b", "c"), seed=(4, 3)).hash
    with pytest.raises(InputError, match="same name"):
        _ = Configuration(model=("a/b", "c/b")).parts


def test_prompts_that_are_not_finite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run leaves them out of its scores, and says so once, at its end."""
    model, prompts = not_finite.model(), not_finite.prompts()
    bad = not_finite.holds(prompts)
    monkeypatch.setattr(workers.Worker, "part", lambda self, part: (model, prompts))
    lines: list[str] = []
    about = {"n": len(prompts), "unit_size": 4, "batch_size": 4, "measures": ALL}
    config = small(tmp_path, tmp_path / "run.zarr", **about)
    run = carry_out(config, log=lines.append).run
    said = [line for line in lines if "not finite" in line]
    assert len(said) == 1
    assert f"{bad.sum()} of {len(bad)} prompts" in said[0]
    expected = tt.analyze(model, prompts[np.flatnonzero(~bad)])
    for name, values in expected["scores"].data_vars.items():
        np.testing.assert_allclose(run["scores"][name], values, atol=0.02)
    for name in ("predictions", "effects"):
        not_finite.is_missing(run[name].to_dataset(inherit=False).compute(), bad)
    assert run["scores"].attrs["not_finite"] == bad.sum()
    assert run.tt.heads(2) == expected.tt.heads(2)
