"""Units of the suite: seeds of experiments, measured by workers like a run's units."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..errors import StoreError
from ..results.place import Place
from ..runs.load_settings import LoadSettings
from ..runs.worker import Report, worker_name
from .experiment import FULL, QUICK, Experiment
from .run import Trial

if TYPE_CHECKING:
    from ..models import Model

LEDGER = ".units.json"
"""File in the folder of results that lists the units of the last command."""


class SeedUnit(NamedTuple):
    """A seed of an experiment, given by name or file."""

    number: int
    experiment: str
    seed: int

    def __str__(self) -> str:
        return f"{Path(self.experiment).stem}, seed {self.seed}"


@dataclass(frozen=True)
class Suite:
    """Experiments on one model.

    Attributes
    ----------
    names
        Names of experiments, or Python files that define one.
    model, how
        The model, and its load settings.
    task
        A task; None for each experiment's own.
    out
        Folder for the results.
    quick
        Whether to use the short form.
    batch_size
        Prompts per batch.
    show
        Whether measures show progress bars.
    """

    names: tuple[str, ...]
    model: str
    how: LoadSettings = field(default_factory=LoadSettings)
    task: str | None = None
    out: Path = Path("runs/experiments")
    quick: bool = False
    batch_size: int | None = None
    show: bool = False

    @cached_property
    def trials(self) -> dict[str, Trial]:
        """The trials, by name."""
        from ..prompts import load_task
        from .suite import choose

        size = QUICK if self.quick else FULL
        options = {"model": self.model, **self.how.options()}

        def trial(one: Experiment) -> Trial:
            task = load_task(one.task if self.task is None else self.task)
            return Trial(one, task, self.out, size, options)

        return dict(zip(self.names, map(trial, choose(self.names, False)), strict=True))

    @property
    def units(self) -> list[SeedUnit]:
        """All units, in order."""
        seeds = [(name, seed) for name, one in self.trials.items() for seed in one.size.seeds]
        return [SeedUnit(number, *one) for number, one in enumerate(seeds)]

    def missing(self) -> list[SeedUnit]:
        """Return the units that are not measured yet."""
        return [
            unit for unit in self.units if not self.trials[unit.experiment].path(unit.seed).exists()
        ]


class SeedWorker:
    """Measures seeds of experiments.

    Parameters
    ----------
    suite
        The experiments and their model.
    """

    def __init__(self, suite: Suite) -> None:
        self.suite = suite
        self.name = worker_name()

    @cached_property
    def model(self) -> Model:
        """The model."""
        return self.suite.how.load(self.suite.model)

    def describe(self) -> str:
        """Load the model and describe it."""
        return repr(self.model)

    def __call__(self, unit: SeedUnit) -> Report:
        """Measure a seed and save it."""
        model, start = self.model, time.perf_counter()
        trial = self.suite.trials[unit.experiment]
        if not trial.path(unit.seed).exists():
            trial.measure(model, unit.seed, self.suite.show, self.suite.batch_size)
        return Report(time.perf_counter() - start, 0.0, self.name)


class SeedLedger:
    """Units of the last command on a folder, for `twotower status`.

    Parameters
    ----------
    out
        The folder.
    """

    def __init__(self, out: Path) -> None:
        self.place = Place(out)
        self.path = out / LEDGER
        self.lock = threading.Lock()

    def write(self, **about: Any) -> None:
        """Update the ledger file in one atomic step."""
        with self.lock:
            text = json.dumps({**self.read(), **about}, indent=1) + "\n"
            work = self.path.with_suffix(f".{os.getpid()}")
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                work.write_text(text)
                work.replace(self.path)
            except OSError as error:
                raise StoreError(f"{self.path} cannot be written: {error}") from error

    def read(self) -> dict[str, Any]:
        """Read the ledger; empty if there is none."""
        try:
            return dict(json.loads(self.path.read_text()))
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            raise StoreError(f"{self.path} cannot be read: {error}") from error

    def plan(self, suite: Suite) -> None:
        """Record the units to measure."""
        paths = [suite.trials[unit.experiment].path(unit.seed) for unit in suite.units]
        units = zip(suite.units, paths, strict=True)
        self.write(
            units=[
                {"unit": str(unit), "part": str(unit.experiment), "path": str(path)}
                for unit, path in units
            ],
            errors={},
            reports={},
        )

    def forget(self) -> None:
        """Remove the ledger, and the folder if it is empty."""
        self.path.unlink(missing_ok=True)
        for folder in (self.path.parent / "selections", self.path.parent):
            with suppress(OSError):  # the folder is not empty
                folder.rmdir()

    def driver(self) -> dict[str, Any]:
        """Return the last recorded driver, or an empty dict."""
        return dict(self.read().get("driver") or {})

    def beat(self, driver: Mapping[str, Any] | None) -> None:
        """Record the driver of the run."""
        self.write(driver=driver)
