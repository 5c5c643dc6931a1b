"""Drivers and workers killed (-9) at random moments: nothing is lost, nothing is done twice.

`TWOTOWER_KILLS` and `TWOTOWER_KILLS_SEED` set how many kills there are, and the draw.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from small_run import MEASURED, chunks, small

from twotower.cli.status import status_of
from twotower.results.units import DONE, UnitStore
from twotower.runs.run import carry_out

pytest.importorskip("ray")
KILLS = int(os.environ.get("TWOTOWER_KILLS", "2"))
SEED = int(os.environ.get("TWOTOWER_KILLS_SEED", "0"))
N, SIZE = 40, 4


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """A Ray cluster that outlives the drivers."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 4, "include_dashboard": False}
    )
    yield cluster.address
    cluster.shutdown()


def start(checkpoint: Path, out: Path, address: str) -> subprocess.Popen[bytes]:
    settings = {
        "model": checkpoint, "output": out, "n": N, "unit-size": SIZE, "shots": 2,
        "batch-size": 2, "threads": 1, "engine": "ray", "workers": 2, "address": address,
    }  # fmt: skip
    options = [str(x) for name, value in settings.items() for x in (f"--{name}", value)]
    options += ["--measures", *MEASURED]
    command = [sys.executable, "-m", "twotower.cli", "analyze", *options]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def replicas() -> list[psutil.Process]:
    """Workers of the cluster, whose processes are this one's descendants."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if process.cmdline()[:1] and process.cmdline()[0].startswith("ray::Replica"):
                found.append(process)
        except psutil.Error:
            pass  # it ended meanwhile
    return found


def finished(out: Path) -> dict[int, tuple[float, str]]:
    """When and by whom each unit was done, of those that are."""
    ledger = UnitStore(out).ledger()
    rows = zip(ledger.state.values, ledger.finished.values, ledger.worker.values, strict=True)
    return {i: (float(end), str(who)) for i, (state, end, who) in enumerate(rows) if state == DONE}


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_kills(checkpoint: Path, tmp_path: Path, address: str, capsys: Any) -> None:
    rng = random.Random(SEED)
    reference = tmp_path / "reference.zarr"
    carry_out(small(checkpoint, reference, n=N, unit_size=SIZE), log=lambda line: None)
    expected = chunks(reference)
    killed, runs, starts = Counter[str](), 0, 0
    while killed.total() < KILLS:
        runs += 1
        out = tmp_path / f"run-{runs}.zarr"
        kept: dict[int, tuple[float, str]] = {}
        while True:
            driver = start(checkpoint, out, address)
            starts += 1
            died = _kill_on_the_way(driver, out, rng, killed)
            said = driver.communicate(timeout=300)[0].decode()
            if not died:
                assert driver.returncode == 0, said
                break
            if out.exists():
                # The next driver finds these done, and must let them be.
                now = finished(out)
                assert {i: now.get(i) for i in kept} == kept
                kept = now
        now = finished(out)
        assert sorted(now) == list(range(N // SIZE))
        assert {i: now[i] for i in kept} == kept
        assert chunks(out) == expected
        assert status_of(out).failed == 0
    with capsys.disabled():
        print(
            f"\n{killed.total()} kills (seed {SEED}: {killed['driver']} of drivers, "
            f"{killed['worker']} of workers) in {starts} starts of {runs} runs of {N // SIZE} "
            "units: no unit lost, none done twice, all chunks bit-identical"
        )


def _kill_on_the_way(
    driver: subprocess.Popen[bytes], out: Path, rng: random.Random, killed: Counter[str]
) -> bool:
    """Kill workers, until the driver is killed or has ended; whether it was killed."""
    while killed.total() < KILLS:
        least = min(killed["driver"], killed["worker"])
        victim = rng.choice([kind for kind in ("driver", "worker") if killed[kind] == least])
        if rng.random() < 0.15:
            time.sleep(rng.uniform(0, 8))  # perhaps before there is a store, or a worker
        else:
            before = len(finished(out)) if _made(out) else 0
            if before >= N // SIZE - 1:
                return False  # there is nothing left to interrupt
            target = min(before + rng.randint(1, 4), N // SIZE - 1)
            while driver.poll() is None and not (_made(out) and len(finished(out)) >= target):
                time.sleep(0.03)
            time.sleep(rng.uniform(0, 0.3))  # about a unit's time
        if driver.poll() is not None:
            return False
        if victim == "driver":
            driver.send_signal(signal.SIGKILL)
            killed["driver"] += 1
            return True
        workers = replicas()
        if workers:
            rng.choice(workers).send_signal(signal.SIGKILL)
            killed["worker"] += 1
    return False


def _made(out: Path) -> bool:
    return (out / "units" / "state" / "zarr.json").exists()
