"""Runs on Ray: the numbers of one process, whatever happens to workers and nodes.

`make test` has one run; what becomes of workers that die is tested on a pretended cluster
(`test_ray_engine`), and here by `make test-all`.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from command import run as command
from small_run import chunks, small

from twotower.cli.status import status_of
from twotower.errors import StoreError, WorkerError
from twotower.runs.configuration import Configuration
from twotower.runs.drive import drive
from twotower.runs.engine_settings import EngineSettings
from twotower.runs.ray_engine import RayEngine
from twotower.runs.run import carry_out

ray = pytest.importorskip("ray")
ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers do not see the tests

N = 20
"""Prompts of a run, in units of two."""


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A cluster of one node with two CPUs, at first."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False}
    )
    ray.init(address=cluster.address, log_to_driver=False, logging_level="error")
    yield cluster
    ray.shutdown()
    cluster.shutdown()


@pytest.fixture(scope="module")
def reference(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run in this process."""
    out = tmp_path_factory.mktemp("reference") / "run.zarr"
    carry_out(small(checkpoint, out, n=N), log=lambda line: None)
    return out


def on_ray(checkpoint: Path, out: Path, **settings: Any) -> Configuration:
    return small(checkpoint, out, **{"n": N, "engine": "ray", "workers": 2, **settings})


def watching(config: Configuration, done: int, then: Callable[[], None]) -> list[str]:
    """Carry out a run, and do something once so many units are done; what was said."""
    said: list[str] = []

    def watch() -> None:
        end = time.monotonic() + 120
        while time.monotonic() < end:
            try:
                if status_of(config.store).done >= done:
                    return then()
            except Exception:
                pass  # not there yet
            time.sleep(0.2)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        carry_out(config, log=said.append)
    finally:
        thread.join()
    return said


def workers_of(out: Path) -> list[int]:
    return [int(name.split(":")[1]) for name in status_of(out).workers]


@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize("n", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_the_same_bits(n: int, checkpoint: Path, reference: Path, tmp_path: Path) -> None:
    out = tmp_path / "run.zarr"
    carry_out(on_ray(checkpoint, out, workers=n), log=lambda line: None)
    assert chunks(out) == chunks(reference)
    assert len(workers_of(out)) == n
    assert os.getpid() not in workers_of(out)


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
def test_a_worker_is_killed(checkpoint: Path, reference: Path, tmp_path: Path) -> None:
    out = tmp_path / "run.zarr"
    killed: list[int] = []

    def kill() -> None:
        killed.append(workers_of(out)[0])
        os.kill(killed[0], signal.SIGKILL)

    said = watching(on_ray(checkpoint, out, workers=1), 3, kill)
    assert chunks(out) == chunks(reference)
    assert any("died" in line and "retried" in line for line in said)
    assert killed[0] in workers_of(out)
    assert len(workers_of(out)) == 2
    assert os.getpid() not in workers_of(out)


@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["--workers", "9"], "holds 2 workers of 1 CPUs each, not 9; its nodes have: 0 GPUs, 2"),
        (["--gpus-per-replica", "2"], "holds 0 workers of 2 GPUs and 1 CPUs each"),
        (["--threads", "8"], "holds 0 workers of 8 CPUs each"),
    ],
)
def test_what_the_cluster_cannot_hold(
    settings: list[str], message: str, checkpoint: Path, tmp_path: Path, capsys: Any
) -> None:
    out = tmp_path / "run.zarr"
    code = command("analyze", "--model", checkpoint, "--output", out, "--engine", "ray", *settings)
    assert code == 2
    assert message in capsys.readouterr().err
    assert not out.exists()


class Sick:
    """A worker that units kill, exhaust, or make wait."""

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)
        try:
            (self.folder / "slow").touch(exist_ok=False)
            self.slow = True
        except FileExistsError:
            self.slow = False

    def __call__(self, unit: str) -> Any:
        with (self.folder / unit).open("a") as file:
            file.write("x")
        if unit == "deadly":
            os.kill(os.getpid(), signal.SIGKILL)
        if unit == "hungry":
            import resource

            resource.setrlimit(resource.RLIMIT_AS, (1 << 33, resource.RLIM_INFINITY))
            return bytearray(1 << 34)
        time.sleep(0.3 if self.slow else 0.03)
        return Went(self.slow)


class Went:
    def __init__(self, slow: bool) -> None:
        self.seconds, self.slow = 0.0, slow


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
def test_what_kills_a_worker_is_set_aside(tmp_path: Path) -> None:
    units = ["deadly", *(f"unit-{i}" for i in range(6)), "hungry"]
    said: list[str] = []
    engine = RayEngine(
        EngineSettings(engine="ray", workers=2), lambda: Sick(str(tmp_path)), threads=1
    )
    try:
        driven = drive(engine, units, log=said.append)
    finally:
        engine.close()
    assert driven.done == 6
    assert set(driven.failed) == {"deadly", "hungry"}
    assert isinstance(driven.failed["deadly"], WorkerError)
    assert isinstance(driven.failed["hungry"], MemoryError)
    for unit in units:
        tries = 3 if unit in driven.failed else 1
        assert (tmp_path / unit).read_text() == "x" * tries


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
def test_work_is_pulled(tmp_path: Path) -> None:
    """A worker ten times as slow gets far fewer units, and nobody waits for it."""
    slow: list[bool] = []
    engine = RayEngine(
        EngineSettings(engine="ray", workers=2), lambda: Sick(str(tmp_path)), threads=1
    )
    try:
        units = [f"unit-{i}" for i in range(40)]
        drive(
            engine,
            units,
            seen=lambda engine, outcome: outcome and slow.append(outcome.report.slow),
        )
    finally:
        engine.close()
    assert len(slow) == 40
    assert 1 <= sum(slow) <= 12


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
def test_workers_that_never_come_to_be() -> None:
    def broken() -> None:
        raise RuntimeError("no such library")

    with pytest.raises(WorkerError, match="die while starting.*no such library"):
        RayEngine(EngineSettings(engine="ray", workers=1), broken, threads=1)


@pytest.mark.slow
@pytest.mark.demo_model
@pytest.mark.usefixtures("cluster", "demo_model")
def test_experiments(tmp_path: Path, capsys: Any) -> None:
    """Two experiments on two workers; what they have in common is measured once."""
    names, out = ("qk-similarity", "ov-labels"), tmp_path / "out"
    given = ("--quick", "--engine", "ray", "--workers", "2", "--threads", "1", "--out", out)
    assert command("experiments", "run", *names, *given) == 0
    for name in names:
        found = json.loads((out / f"{name}.json").read_text())
        assert found["verdict"] == "undecided"  # one seed
        assert found["numbers"]
        assert (out / f"{name}.png").exists()
    stores = [path for path in (out / "selections").iterdir() if path.suffix == ".zarr"]
    assert len(stores) == 1
    status = status_of(out)
    assert (status.units, status.done, status.driver) == (2, 2, "")
    assert len(status.workers) == 2
    capsys.readouterr()
    assert command("status", out) == 0
    assert "complete" in capsys.readouterr().out
    assert command("experiments", "run", *names, *given) == 0
    assert capsys.readouterr().out.count("measured before") == 2


@pytest.mark.slow
def test_a_node_leaves(cluster: Any, checkpoint: Path, reference: Path, tmp_path: Path) -> None:
    """Three nodes, a worker on each; one node goes, and its worker's unit is done by another."""
    out = tmp_path / "run.zarr"
    nodes = [cluster.add_node(num_cpus=4) for _ in range(3)]  # too few CPUs are on the first
    cluster.wait_for_nodes()
    try:
        config = on_ray(checkpoint, out, workers=3, threads=3)
        said = watching(config, 4, lambda: cluster.remove_node(nodes[0], allow_graceful=False))
    finally:
        for node in nodes[1:]:
            cluster.remove_node(node)
    assert any("died" in line for line in said)
    assert status_of(out).done == N // 2
    assert status_of(out).failed == 0
    assert chunks(out).keys() == chunks(reference).keys()


@pytest.mark.slow
def test_ctrl_c(checkpoint: Path, tmp_path: Path) -> None:
    """On a cluster of its own: workers end their units, though the terminal tells all of them."""
    out = tmp_path / "run.zarr"
    given = ["--model", checkpoint, "--output", out, "--n", 2000, "--unit-size", 2, "--shots", 2]
    given += ["--threads", 1, "--engine", "ray", "--workers", 1]
    process = subprocess.Popen(
        [sys.executable, "-m", "twotower.cli", "analyze", *map(str, given)],
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    end = time.monotonic() + 120
    while time.monotonic() < end and process.poll() is None:
        with suppress(StoreError):
            if status_of(out).done >= 3:
                break
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert "Ctrl-C again stops at once" in said
    status = status_of(out)
    assert 3 <= status.done < 1000
    assert (status.failed, status.driver) == (0, "")
