"""Runs on many workers: throughput, what the driver and the store cost, and where they limit.

Measured on one machine with one thread a worker; larger clusters are simulated from what was
measured. With Ray: pip install 'twotower[ray]'.

    python benchmarks/scale.py --promote
"""

from __future__ import annotations

import heapq
import os
import random
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean, median
from typing import Any

import common
import numpy as np

from twotower.results.units import UnitStore
from twotower.runs.configuration import Configuration
from twotower.runs.drive import drive
from twotower.runs.engine_settings import EngineSettings
from twotower.runs.ray_engine import RayEngine
from twotower.runs.run import carry_out
from twotower.runs.worker import Report

PROMPTS, UNIT = 192, 8
LEAST, DRIVER, WRITING = 1.85, 0.02, 0.03
"""Least speed of two workers against one; most that the driver and writing may take."""

WORKERS = (8, 64, 512)


def one_run(model: str, folder: Path, workers: int, n: int, **settings: Any) -> dict[str, float]:
    """A run, and what its ledger says."""
    config = Configuration(
        model=(model,),
        output=str(folder / f"{workers}.zarr"),
        overwrite=True,
        n=n,
        shots=4,
        unit_size=UNIT,
        threads=1,
        engine="ray",
        workers=workers,
        **settings,
    )
    finished = carry_out(config, log=lambda line: None)
    ledger = UnitStore(config.store).ledger()
    ends, took = ledger.finished.values, ledger.seconds.values
    who = ledger.worker.values
    names = sorted(set(map(str, who)))
    if len(names) != workers:
        sys.exit(f"{len(names)} workers took part, not {workers}")
    # The steady state: from when all have done a unit to when the first has no more.
    begin = max(ends[who == name].min() for name in names)
    end = min(ends[who == name].max() for name in names)
    gaps = 0.0
    for name in names:
        order = np.argsort(ends[who == name])
        stops = ends[who == name][order]
        starts = stops - took[who == name][order]
        gaps += float((starts[1:] - stops[:-1]).sum())
    sizes = [p.stat().st_size for p in Path(config.store).glob("*/*/c.0.*")]
    sizes += [p.stat().st_size for p in Path(config.store).glob("*/*/c.0")]
    return {
        "prompts_per_second": float(((ends > begin) & (ends <= end)).sum()) * UNIT / (end - begin),
        "unit_seconds": float(np.mean(took)),
        "driver_share": gaps / float(took.sum()),
        "writing_share": finished.driven.writing / finished.driven.busy,
        "writing_seconds": finished.driven.writing / finished.driven.done,
        "unit_bytes": float(sum(sizes)),
        "times": [round(float(x), 3) for x in took],  # type: ignore[dict-item]
    }


class Nothing:
    """A worker that does nothing, so that the driver alone is timed."""

    def __call__(self, unit: int) -> Report:
        return Report(0.0, 0.0, "nothing")


def driver_seconds(units: int = 2000) -> float:
    """Seconds of the driver for a unit."""
    engine = RayEngine(EngineSettings(engine="ray", workers=2), Nothing, threads=1)
    try:
        return drive(engine, range(units)).seconds / units
    finally:
        engine.close()


def disk_bytes_per_second(folder: Path) -> float:
    """Speed at which one process gets files of a unit's size onto the disk."""
    block, n = os.urandom(4 << 20), 32
    start = time.perf_counter()
    for number in range(n):
        with (folder / f"{number}").open("wb") as file:
            file.write(block)
            os.fsync(file.fileno())
    return n * len(block) / (time.perf_counter() - start)


@dataclass(frozen=True)
class Cluster:
    """What a simulated run consists of.

    Attributes
    ----------
    times
        Seconds of units, from which each is drawn.
    driver
        Seconds of the driver for a unit; it handles one after the other.
    size
        Bytes of a unit.
    bandwidth
        Bytes per second that the store takes from all workers together.
    """

    times: tuple[float, ...]
    driver: float
    size: float
    bandwidth: float

    def seconds(self, workers: int, units: int) -> float:
        """Wall time of a simulated run.

        A worker waits for the driver, measures, and writes; driver and store are queues.
        """
        rng = random.Random(0)
        asks, writes = 0, 1
        events = [(0.0, asks, worker) for worker in range(workers)]
        driver = store = 0.0
        while events:
            now, event, worker = heapq.heappop(events)
            if event == writes:
                store = max(store, now) + self.size / self.bandwidth
                heapq.heappush(events, (store, asks, worker))
            elif units:
                units -= 1
                driver = max(driver, now) + self.driver
                heapq.heappush(events, (driver + rng.choice(self.times), writes, worker))
        return store


def simulated(cluster: Cluster) -> list[dict[str, Any]]:
    """Throughput by number of workers, and what limits it."""
    rows = []
    for workers in WORKERS:
        ideal = workers / mean(cluster.times)
        limits = {
            "workers": ideal,
            "driver": 1 / cluster.driver,
            "store": cluster.bandwidth / cluster.size,
        }
        units = 100 * workers
        found = units / cluster.seconds(workers, units)
        rows.append(
            {
                "workers": workers,
                "units_per_second": found,
                "efficiency": found / ideal,
                "limit": min(limits, key=lambda name: limits[name]),
            }
        )
    return rows


def main() -> None:
    parser = common.arguments(__doc__.splitlines()[0], "scale")
    parser.set_defaults(rounds=3)
    parser.add_argument("--prompts", type=int, default=PROMPTS)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        found: dict[int, list[dict[str, float]]] = {1: [], 2: []}
        for round_ in range(options.rounds):
            for workers in (1, 2):
                one = one_run(options.model, folder, workers, options.prompts * workers)
                found[workers].append(one)
                rate = one["prompts_per_second"]
                print(f"round {round_}, {workers} workers: {rate:.2f} prompts/s", flush=True)
        labels = one_run(options.model, folder, 1, 2 * UNIT, keep="labels")
        driver, bandwidth = driver_seconds(), disk_bytes_per_second(folder)
    times = tuple(x for one in found[1] for x in one.pop("times"))  # type: ignore[attr-defined]
    for one in found[2]:
        one.pop("times")
    pairs = zip(found[1], found[2], strict=True)
    speedup = median(b["prompts_per_second"] / a["prompts_per_second"] for a, b in pairs)
    middle = {
        f"{workers} workers": {key: median(x[key] for x in runs) for key in runs[0]}
        for workers, runs in found.items()
    }
    size = middle["1 workers"]["unit_bytes"]
    here = Cluster(times, driver, size, bandwidth)
    fast = tuple(x / 100 for x in times)
    scenarios = {
        "units as measured": here,
        "workers 100 times as fast": replace(here, times=fast),
        "the same, 8 times as many prompts in a unit": replace(
            here, times=tuple(8 * x for x in fast), size=8 * size
        ),
        "the same, keep='labels'": replace(here, times=fast, size=labels["unit_bytes"]),
        "the same, both": replace(
            here, times=tuple(8 * x for x in fast), size=8 * labels["unit_bytes"]
        ),
        "the same, both, a store of 2 GB/s": replace(
            here, times=tuple(8 * x for x in fast), size=8 * labels["unit_bytes"], bandwidth=2e9
        ),
    }
    result = {
        "machine": common.machine(1),
        "model": options.model,
        "unit_prompts": UNIT,
        "speedup_of_two": speedup,
        "measured": middle,
        "unit_bytes_labels": labels["unit_bytes"],
        "driver_seconds": driver,
        "disk_bytes_per_second": bandwidth,
        "simulated": {name: simulated(cluster) for name, cluster in scenarios.items()},
    }
    shares = {
        name: max(one[name] for one in middle.values()) for name in next(iter(middle.values()))
    }
    print(f"two workers are {speedup:.2f} times as fast as one")
    print(f"between units: {shares['driver_share']:.2%}; writing: {shares['writing_share']:.2%}")
    print(f"the driver takes {1000 * driver:.2f} ms a unit; the disk {bandwidth / 1e6:.0f} MB/s")
    for name, rows in result["simulated"].items():
        for row in rows:
            print(
                f"{name}, {row['workers']} workers: {row['units_per_second']:.1f} units/s, "
                f"{row['efficiency']:.0%} of ideal; limit: {row['limit']}"
            )
    common.finish(result, "scale", options)
    missed = [
        text
        for text, bad in (
            (f"two workers: {speedup:.2f} of {LEAST}", speedup < LEAST),
            (f"driver: {shares['driver_share']:.2%}", shares["driver_share"] > DRIVER),
            (f"writing: {shares['writing_share']:.2%}", shares["writing_share"] > WRITING),
        )
        if bad
    ]
    if missed:
        sys.exit("missed: " + "; ".join(missed))


if __name__ == "__main__":
    main()
