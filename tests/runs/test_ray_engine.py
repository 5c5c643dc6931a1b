"""The engine of runs on Ray, on a pretended cluster (`fake_ray`); `test_ray` has a real one."""

from __future__ import annotations

import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from command import run as command
from fake_ray import FakeRay, Killed
from small_run import chunks, small

from twotower.cli.status import status_of
from twotower.errors import InputError, StoreError, WorkerError
from twotower.runs import worker as workers
from twotower.runs.drive import Driven, drive
from twotower.runs.engine_settings import EngineSettings
from twotower.runs.ray_engine import RayEngine
from twotower.runs.run import carry_out

Start = Callable[..., FakeRay]

pytestmark = pytest.mark.usefixtures("loaded_once")


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Start:
    """Function that makes a cluster of nodes with so many CPUs, or CPUs and GPUs."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)

    def start(*nodes: Any) -> FakeRay:
        ray = FakeRay(*nodes)
        monkeypatch.setitem(sys.modules, "ray", ray)
        return ray

    return start


class Simple:
    """A worker whose units may kill it, raise, or take a while."""

    numbers = count()

    def __init__(self, ray: FakeRay, seconds: float = 1.0) -> None:
        self.ray, self.seconds = ray, seconds
        self.name = f"worker {next(self.numbers)}"

    def __call__(self, unit: Any) -> str:
        self.ray.work(self.seconds)
        if unit == "deadly":
            raise Killed
        if unit == "hungry":
            raise MemoryError("too much")
        if unit == "unwritable":
            raise StoreError("the disk is full")
        return self.name

    def greet(self, name: str) -> str:
        return f"{self.name} greets {name}"


def engine_of(make: Callable[[], Any], threads: int | None = 1, **settings: Any) -> RayEngine:
    return RayEngine(EngineSettings(engine="ray", **settings), make, threads)


def driven_by(engine: RayEngine, units: list[Any], **options: Any) -> tuple[Driven, list[Any]]:
    """What `drive` returns, and the reports in order."""
    reports: list[Any] = []

    def seen(engine: Any, outcome: Any) -> None:
        if outcome is not None:
            reports.append(outcome.report)

    try:
        return drive(engine, units, **{"seen": seen, **options}), reports
    finally:
        engine.close()


# ---- where workers go ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("nodes", "settings", "threads", "expected"),
    [
        ((4,), {}, None, (1, 0, 4)),  # workers, GPUs of each, threads
        ((4,), {"workers": 2}, None, (2, 0, 2)),
        ((4,), {}, 2, (2, 0, 2)),
        ((4, 3), {}, 2, (3, 0, 2)),
        (((8, 4),), {}, None, (4, 1, 2)),
        (((8, 4),), {"gpus_per_replica": 2}, None, (2, 2, 4)),
        (((8, 4), (8, 1)), {}, None, (5, 1, 1)),
        (((8, 4),), {"gpus_per_replica": 0, "workers": 1}, None, (1, 0, 8)),
    ],
)
def test_workers_by_what_the_nodes_have(
    cluster: Start, nodes: Any, settings: Any, threads: int | None, expected: tuple[int, int, int]
) -> None:
    ray = cluster(*nodes)
    engine = engine_of(lambda: Simple(ray), threads, **settings)
    drive(engine, range(20))
    assert (len(engine.slots), engine.options["num_gpus"], engine.threads) == expected
    assert torch.get_num_threads() == expected[2]
    engine.close()
    assert not any(actor.alive for actor in ray.actors)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["--workers", "9"], "holds 4 workers of 1 CPUs each, not 9; its nodes have: 0 GPUs, 4"),
        (["--gpus-per-replica", "2"], "holds 0 workers of 2 GPUs and 1 CPUs each"),
        (["--threads", "8"], "holds 0 workers of 8 CPUs each"),
    ],
)
def test_what_the_cluster_cannot_hold(
    cluster: Start, settings: list[str], message: str, checkpoint: Path, tmp_path: Path, capsys: Any
) -> None:
    ray, out = cluster(4), tmp_path / "run.zarr"
    code = command("analyze", "--model", checkpoint, "--output", out, "--engine", "ray", *settings)
    assert code == 2
    assert message in capsys.readouterr().err
    assert not out.exists()
    assert not ray.is_initialized()


def test_which_cluster_is_joined(cluster: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    ray = cluster(1)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    engine_of(lambda: Simple(ray), address="auto").close()
    assert ray.joined == ["auto"]
    ray.joined.clear()
    engine_of(lambda: Simple(ray)).close()
    assert ray.joined == ["local"]
    ray.joined.clear()
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    engine_of(lambda: Simple(ray)).close()
    assert ray.joined == ["10.0.0.1:6379"]
    engine_of(lambda: Simple(ray), address="auto").close()
    assert ray.joined == ["10.0.0.1:6379"]  # it is in that one already


def test_a_cluster_that_is_there_already_is_left(cluster: Start) -> None:
    ray = cluster(1)
    ray.init("auto")
    engine_of(lambda: Simple(ray)).close()
    assert ray.is_initialized()


def test_a_cluster_that_is_not_there(
    cluster: Start, checkpoint: Path, tmp_path: Path, capsys: Any
) -> None:
    cluster(1)
    code = command(
        "analyze", "--model", checkpoint, "--output", tmp_path / "run.zarr", "--engine", "ray",
        "--address", "127.0.0.1:1",
    )  # fmt: skip
    assert code == 2
    assert "cannot be joined" in capsys.readouterr().err


def test_without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(InputError, match=r"pip install 'twotower\[ray\]'"):
        engine_of(lambda: None)


def test_no_worker_in_time(cluster: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("twotower.runs.ray_engine.PLACING", 0.0)
    ray = cluster(2)
    ray.cluster[0].cpus = 0.0  # somebody else has them
    with pytest.raises(WorkerError, match="could be placed within 0 s; .* {'CPU': 0.0} free"):
        engine_of(lambda: Simple(ray))


# ---- what may happen to workers ------------------------------------------------------------------


def test_workers_that_never_come_to_be(cluster: Start) -> None:
    ray = cluster(2)

    def broken() -> None:
        raise RuntimeError("no such library")

    with pytest.raises(WorkerError, match="die while starting.*no such library"):
        engine_of(broken, workers=1)
    assert len(ray.actors) == 3
    assert not ray.is_initialized()


def test_a_worker_that_comes_to_be_at_the_third_attempt(cluster: Start) -> None:
    ray, tries = cluster(1), count()

    def make() -> Simple:
        if next(tries) < 2:
            raise RuntimeError("a bad day")
        return Simple(ray)

    driven, _ = driven_by(engine_of(make), ["a", "b"])
    assert driven.done == 2


def test_what_kills_a_worker_is_set_aside(cluster: Start) -> None:
    ray, tries, said = cluster(4), Counter[str](), []

    class Counted(Simple):
        def __call__(self, unit: str) -> str:
            tries[unit] += 1
            return super().__call__(unit)

    units = ["deadly", *(f"unit-{i}" for i in range(6)), "hungry"]
    driven, _ = driven_by(engine_of(lambda: Counted(ray), workers=2), units, log=said.append)
    assert driven.done == 6
    assert set(driven.failed) == {"deadly", "hungry"}
    assert isinstance(driven.failed["deadly"], WorkerError)
    assert isinstance(driven.failed["hungry"], MemoryError)
    assert tries == {unit: 3 if unit in driven.failed else 1 for unit in units}
    assert sum("died" in line for line in said) == 3
    assert len(ray.actors) == 2 + 3


def test_a_store_that_refuses_stops_all(cluster: Start) -> None:
    ray = cluster(2)
    with pytest.raises(StoreError, match="the disk is full"):
        driven_by(engine_of(lambda: Simple(ray), workers=2), ["unwritable", *range(9)])
    assert not any(actor.alive for actor in ray.actors)


def test_work_is_pulled(cluster: Start) -> None:
    """A worker ten times as slow gets far fewer units, and nobody waits for it."""
    ray, speeds = cluster(2), iter((1.0, 0.1))
    driven, by = driven_by(engine_of(lambda: Simple(ray, next(speeds)), workers=2), [*range(40)])
    assert driven.done == 40
    share = Counter(by)
    assert sorted(share.values()) == [4, 36]
    assert ray.now == pytest.approx(4.0, abs=0.5)


def test_a_node_leaves(cluster: Start) -> None:
    """Three nodes, a worker on each; one node goes, and its worker's unit is done by another."""
    ray, said = cluster(4, 4, 4), []
    engine = engine_of(lambda: Simple(ray), threads=3, workers=3)
    reports: list[Any] = []

    def seen(engine: Any, outcome: Any) -> None:
        if outcome is not None and outcome.error is None:
            reports.append(outcome.report)
            if len(reports) == 4:
                ray.remove_node(ray.cluster[0])

    driven, _ = driven_by(engine, [*range(18)], seen=seen, log=said.append)
    assert (driven.done, driven.failed) == (18, {})
    assert sum("died" in line and "retried" in line for line in said) == 1
    assert len(set(reports[6:])) == 2  # there is no room for a third


def test_all_workers_gone_and_back(cluster: Start) -> None:
    """The only node's worker dies twice while no other is there: the next one goes on."""
    ray = cluster(1)
    driven, _ = driven_by(engine_of(lambda: Simple(ray)), ["deadly", "a", "b"])
    assert driven.done == 2
    assert set(driven.failed) == {"deadly"}


def test_calls_of_methods(cluster: Start) -> None:
    """They go to a living worker; what they raise arrives as raised."""
    ray = cluster(2)

    class Fragile(Simple):
        def greet(self, name: str) -> str:
            if not died:
                died.append(self.name)
                raise Killed
            if name == "nobody":
                raise InputError("there is nobody")
            return super().greet(name)

    died: list[str] = []
    engine = engine_of(lambda: Fragile(ray), workers=2)
    assert engine.call("greet", "you").endswith("greets you")
    assert died[0] not in engine.slots
    with pytest.raises(InputError, match="there is nobody"):
        engine.call("greet", "nobody")
    engine.close()


def test_ctrl_c_lets_units_end(cluster: Start) -> None:
    ray, said = cluster(2), []

    class Interrupted(Simple):
        def __call__(self, unit: int) -> str:
            if unit == 3:
                signal.raise_signal(signal.SIGINT)
            return super().__call__(unit)

    engine = engine_of(lambda: Interrupted(ray), workers=2)
    driven, by = driven_by(engine, [*range(9)], log=said.append)
    assert driven.interrupted
    assert driven.done == len(by) == 4  # both workers' units
    assert said == ["stopping after the running units; Ctrl-C again stops at once"]


def test_a_run_whose_worker_dies(
    cluster: Start, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bits of an uninterrupted run in this process."""
    ray, names, calls = cluster(2), count(), count()
    expected, out = tmp_path / "expected.zarr", tmp_path / "run.zarr"
    carry_out(small(checkpoint, expected), log=lambda line: None)
    call = workers.Worker.__call__

    def deadly(worker: workers.Worker, unit: Any) -> Any:
        ray.work(1.0)
        report = call(worker, unit)
        if next(calls) == 2:
            raise Killed
        return report

    monkeypatch.setattr(workers.Worker, "__call__", deadly)
    monkeypatch.setattr(workers, "worker_name", lambda: f"there:{next(names)}")
    said: list[str] = []
    carry_out(small(checkpoint, out, engine="ray", workers=2), log=said.append)
    assert chunks(out) == chunks(expected)
    assert any("died" in line and "retried" in line for line in said)
    status = status_of(out)
    assert (status.done, status.failed) == (6, 0)
    assert next(names) == 3
