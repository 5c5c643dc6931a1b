"""Runs in an object store, on a server of this machine that speaks S3."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
from command import run as command
from small_run import ALL, small

import twotower as tt
from twotower.cli.status import status_of
from twotower.errors import StoreError
from twotower.results.place import Place
from twotower.runs import worker
from twotower.runs.run import carry_out

pytest.importorskip("obstore")
moto = pytest.importorskip("moto.server")
pytestmark = pytest.mark.usefixtures("loaded_once")


class Server:
    """An S3 server, which can be away for a while."""

    def __init__(self) -> None:
        self.server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        self.server.start()
        self.port = self.server.get_host_and_port()[1]

    def stop(self) -> None:
        self.server.stop()

    def restart(self) -> None:
        self.server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=self.port, verbose=False)
        self.server.start()


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    import boto3

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    with pytest.MonkeyPatch.context() as patch:
        # Else each request lists moto's folder to find its service: half of the server's time.
        dispatcher = "moto.moto_server.werkzeug_app.DomainDispatcherApplication"
        patch.setattr(f"{dispatcher}.get_backend_for_host", lambda self, host: host and "s3")
        patch.setenv("AWS_ACCESS_KEY_ID", "key")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        server = Server()
        patch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.port}")
        boto3.client("s3").create_bucket(Bucket="runs")
        yield server
        server.stop()


def same(one: xr.DataTree, other: xr.DataTree) -> None:
    assert set(one.children) == set(other.children)
    for name in set(one.children) - {"units"}:
        a, b = (tree[name].to_dataset(inherit=False).compute() for tree in (one, other))
        xr.testing.assert_equal(a, b)


@pytest.mark.slow
@pytest.mark.usefixtures("server")
def test_a_run_of_all_measures(checkpoint: Path, tmp_path: Path) -> None:
    url, about = "s3://runs/deep/all.zarr", {"n": 12, "measures": ALL}
    carry_out(small(checkpoint, url, **about), log=lambda line: None)
    carry_out(small(checkpoint, tmp_path / "run.zarr", **about), log=lambda line: None)
    same(tt.open(url), tt.open(tmp_path / "run.zarr"))


@pytest.mark.usefixtures("server")
def test_a_run_that_is_stopped_goes_on_and_is_replaced(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    url, measured = "s3://runs/deep/run.zarr", []
    about = {"n": 4, "measures": ("qk",)}
    call = worker.Worker.__call__

    def stops(self: Any, unit: Any) -> Any:
        if len(measured) == 1:
            raise KeyboardInterrupt
        measured.append(unit.number)
        return call(self, unit)

    with monkeypatch.context() as patch:
        patch.setattr(worker.Worker, "__call__", stops)
        with pytest.raises(KeyboardInterrupt):
            carry_out(small(checkpoint, url, **about), log=lambda line: None)
    assert status_of(url).done == 1
    assert tt.open(url).qk.measured.values.sum() == 2
    assert carry_out(small(checkpoint, url, **about), log=lambda line: None).before == 1
    carry_out(small(checkpoint, tmp_path / "run.zarr", **about), log=lambda line: None)
    run = tt.open(url)
    same(run, tt.open(tmp_path / "run.zarr"))
    assert run.qk.score.chunks[0] == (2, 2)  # lazy
    assert command("status", url) == 0
    assert "complete" in capsys.readouterr().out
    with pytest.raises(StoreError, match="shots was 2, is now 3"):
        carry_out(small(checkpoint, url, shots=3, **about), log=lambda line: None)
    other = small(checkpoint, url, overwrite=True, n=2, measures=("predictions",))
    carry_out(other, log=lambda line: None)
    assert set(tt.open(url).children) == {"predictions", "prompts", "units"}
    assert tt.open(url).predictions.sizes["prompt"] == 2


def test_a_server_that_is_away_for_a_while(
    server: Server, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    about = {"n": 4, "measures": ("predictions",)}
    config = small(checkpoint, "s3://runs/away.zarr", patience=60.0, **about)
    call, away = worker.Worker.__call__, threading.Timer(1.0, server.restart)

    def leaves(self: Any, unit: Any) -> Any:
        report = call(self, unit)
        server.stop()
        away.start()
        monkeypatch.undo()  # the next units wait for the store
        return report

    monkeypatch.setattr(worker.Worker, "__call__", leaves)
    finished = carry_out(config, log=lambda line: None)
    away.join()
    assert finished.driven.done == 2
    assert "measured" not in finished.run.predictions.coords


@pytest.mark.usefixtures("server")
def test_saved_in_one_piece(llama: tt.Model, prompts: tt.Prompts) -> None:
    run = tt.analyze(llama, prompts, measures=("qk",))
    url = "s3://runs/piece.zarr"
    assert tt.save(run, url) == url
    found = tt.open(url)
    np.testing.assert_array_equal(found.qk.score.values, run.qk.score.values)
    with pytest.raises(StoreError, match="exists already"):
        tt.save(run, url)
    tt.save(run, url, overwrite=True)


@pytest.mark.usefixtures("server")
def test_places_that_cannot_be_used() -> None:
    with pytest.raises(StoreError, match="there is no store at s3://runs/nothing"):
        tt.open("s3://runs/nothing.zarr")
    with pytest.raises(StoreError, match="s3://no-such-bucket/x cannot be listed"):
        tt.open("s3://no-such-bucket/x")
    with pytest.raises(StoreError, match="cannot be used"):
        Place("nowhere://x").store()
