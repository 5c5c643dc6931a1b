"""Progress of a run, read from its store, also while the run is in progress."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..experiments.units import LEDGER, SeedLedger
from ..runs.claim import alive

if TYPE_CHECKING:
    from rich.console import Console

    from ..results.units import UnitStore


@dataclass
class Status:
    """Progress of a run.

    Attributes
    ----------
    place
        The store.
    units, done, running, missing, failed
        Numbers of units; running units are not counted as missing.
    prompts, prompts_done
        Numbers of prompts; None for experiments, whose units are seeds.
    prompts_per_second
        Recent rate of all workers together; None if unknown.
    seconds_left
        Estimate at this rate; None if no process drives the run.
    driver
        Host and process that drive the run; "" if there is none.
    parts
        Numbers of done and of all units, by part.
    workers
        Number of units done, by host and process.
    errors
        Error message of each failed unit.
    """

    place: str
    units: int
    done: int
    running: int
    missing: int
    failed: int
    driver: str
    parts: dict[str, tuple[int, int]]
    prompts: int | None = None
    prompts_done: int | None = None
    prompts_per_second: float | None = None
    seconds_left: float | None = None
    workers: dict[str, int] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """Return the status as a dict for JSON."""
        return asdict(self)


RECENT = 64
"""Number of last units from which the rate is computed."""


def status_of(place: str | Path) -> Status:
    """Return the progress of a run, or of experiments that write into a folder.

    Raises
    ------
    StoreError
        If the store holds no run measured in units.
    """
    from ..results.units import DONE, FAILED, UnitStore

    store = UnitStore(place)
    if not store.place.remote and (store.place.path / LEDGER).exists():
        return _of_suite(SeedLedger(store.place.path))
    ledger = store.ledger()
    living = _living(store)
    state = ledger["state"].values
    size = (ledger["stop"] - ledger["start"]).values
    done, failed = state == DONE, state == FAILED
    running = [i for i in living.get("running", []) if not done[i]]
    rate = _rate(ledger["finished"].values, size, done, living)
    left = int(size[~done & ~failed].sum())
    part = ledger["part"].values
    parts = {name: part == name for name in dict.fromkeys(map(str, part))}
    workers = [str(name) for name in ledger["worker"].values[done]]
    units = store.units() if failed.any() else []
    return Status(
        place=str(store.place),
        units=len(state),
        prompts=int(size.sum()),
        done=int(done.sum()),
        running=len(running),
        missing=int((~done & ~failed).sum()) - sum(not failed[i] for i in running),
        failed=int(failed.sum()),
        prompts_done=int(size[done].sum()),
        prompts_per_second=rate,
        seconds_left=left / rate if rate and living else None,
        driver=_name(living),
        parts={name: (int(done[here].sum()), int(here.sum())) for name, here in parts.items()},
        workers=dict(Counter(workers)),
        errors={str(units[i]): str(ledger["error"].values[i]) for i in failed.nonzero()[0]},
    )


def _living(store: UnitStore | SeedLedger) -> dict[str, Any]:
    """Return the driver of a run if it is alive, else an empty dict."""
    driver = store.driver()
    return driver if alive(driver, itself=True) else {}


def _name(driver: dict[str, Any]) -> str:
    return f"{driver['host']}:{driver['process']}" if driver else ""


def _of_suite(ledger: SeedLedger) -> Status:
    """Return the progress of the experiments of the last command."""
    about = ledger.read()
    living = _living(ledger)
    units, errors = about.get("units", []), about.get("errors", {})
    done = [Path(unit["path"]).exists() for unit in units]
    failed = [unit["unit"] in errors and not end for unit, end in zip(units, done, strict=True)]
    running = [i for i in living.get("running", []) if not done[i]]
    parts: dict[str, tuple[int, int]] = {}
    for unit, end in zip(units, done, strict=True):
        before = parts.get(unit["part"], (0, 0))
        parts[unit["part"]] = (before[0] + end, before[1] + 1)
    workers = [report["worker"] for report in about.get("reports", {}).values()]
    return Status(
        place=str(ledger.place),
        units=len(units),
        done=sum(done),
        running=len(running),
        missing=len(units) - sum(done) - sum(failed) - len(running),
        failed=sum(failed),
        driver=_name(living),
        parts=parts,
        workers=dict(Counter(workers)),
        errors={
            unit["unit"]: errors[unit["unit"]]
            for unit, bad in zip(units, failed, strict=True)
            if bad
        },
    )


def _rate(finished: Any, size: Any, done: Any, living: dict[str, Any]) -> float | None:
    """Return prompts per second over the last units; of a live run, up to now."""
    import numpy as np

    if living:  # ignore units of earlier sessions
        done = done & (finished >= living["started"])
    last = np.flatnonzero(done)[np.argsort(finished[done])][-RECENT:]
    if len(last) < 2:
        return None
    end = time.time() if living else finished[last[-1]]
    span = float(end - finished[last[0]])
    return float(size[last[1:]].sum()) / span if span > 0 else None


def show(status: Status, console: Console) -> None:
    """Print a status."""
    from rich.table import Table

    state = f"driven by {status.driver}" if status.driver else "not running"
    if status.done == status.units:
        state = "complete"
    console.print(f"{status.place}: {state}", soft_wrap=True)
    table = Table()
    for column in (
        "units",
        "done",
        "running",
        "missing",
        "failed",
        "prompts done",
        "prompts/s",
        "left",
    ):
        table.add_column(column, justify="right")
    rate, left = status.prompts_per_second, status.seconds_left
    table.add_row(
        *map(str, (status.units, status.done, status.running, status.missing, status.failed)),
        f"{status.prompts_done} of {status.prompts}",
        "" if rate is None else f"{rate:.2f}",
        "" if left is None else _time(left),
    )
    console.print(table)
    if len(status.parts) > 1:
        for name, (done, units) in status.parts.items():
            console.print(f"  {name}: {done} of {units}", soft_wrap=True)
    for name, n in status.workers.items():
        console.print(f"  {name} did {n}", soft_wrap=True)
    for unit, error in status.errors.items():
        console.print(f"  {unit}: {error}", soft_wrap=True)


def _time(seconds: float) -> str:
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours}:{rest // 60:02}:{rest % 60:02}"
