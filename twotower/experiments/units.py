"""The suite's units: seeds of experiments, measured by workers as a run's units are."""

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
"""File in the folder of results that says what the last command was to measure."""


class SeedUnit(NamedTuple):
    """A seed of an experiment, which has a name in the suite or a file."""

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
        Of experiments, or Python files that make one.
    model, how
        The model, and how it is loaded.
    task
        A task; None for each experiment's own.
    out
        Where results are written.
    quick
        Whether the short form is meant.
    batch_size
        Prompts in a batch.
    show
        Whether measures show bars.
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
        """What is measured, by name."""
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
        """Units that are not measured."""
        return [
            unit for unit in self.units if not self.trials[unit.experiment].path(unit.seed).exists()
        ]


class SeedWorker:
    """Measures seeds of experiments.

    Parameters
    ----------
    suite
        What is measured.
    """

    def __init__(self, suite: Suite) -> None:
        self.suite = suite
        self.name = worker_name()

    @cached_property
    def model(self) -> Model:
        """The model."""
        return self.suite.how.load(self.suite.model)

    def describe(self) -> str:
        """The model in words; loads it."""
        return repr(self.model)

    def __call__(self, unit: SeedUnit) -> Report:
        """Measure a seed, and save it."""
        model, start = self.model, time.perf_counter()
        trial = self.suite.trials[unit.experiment]
        if not trial.path(unit.seed).exists():
            trial.measure(model, unit.seed, self.suite.show, self.suite.batch_size)
        return Report(time.perf_counter() - start, 0.0, self.name)


class SeedLedger:
    """What the last command on a folder was to measure, for `twotower status`.

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
        """Write some of what is known over what is there, in one step."""
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
        """What is known; nothing where no command was given."""
        try:
            return dict(json.loads(self.path.read_text()))
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            raise StoreError(f"{self.path} cannot be read: {error}") from error

    def plan(self, suite: Suite) -> None:
        """Say what is to be measured."""
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
        """Remove what was written here, and the folder if nothing else is in it."""
        self.path.unlink(missing_ok=True)
        for folder in (self.path.parent / "selections", self.path.parent):
            with suppress(OSError):  # something is in it
                folder.rmdir()

    def driver(self) -> dict[str, Any]:
        """Who drives the run, as was said last."""
        return dict(self.read().get("driver") or {})

    def beat(self, driver: Mapping[str, Any] | None) -> None:
        """Say who drives the run."""
        self.write(driver=driver)
