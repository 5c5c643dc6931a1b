"""Carry out experiments: one unit per seed, then a verdict, a figure and a JSON file.

Each seed's measurement is saved when complete. The same command reuses it later.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import StoreError
from ..options import set_options
from ..progress import stage
from ..statistics import Estimate
from .experiment import FULL, VERDICTS, Experiment, Judgement, Setting, Size, short_hash

if TYPE_CHECKING:
    import xarray as xr

    from ..models import Model
    from ..prompts import Task


@dataclass(frozen=True)
class Trial:
    """An experiment on a model and a task.

    Attributes
    ----------
    experiment, task, size
        The experiment, its task, and the numbers of prompts and heads.
    out
        Folder for `NAME/seed-*.zarr`, `NAME.json`, `NAME.png` and `NAME.svg`.
    options
        Load options of the model, to distinguish measurements; "model" is its name.
    """

    experiment: Experiment
    task: Task
    out: Path
    size: Size
    options: Mapping[str, Any]

    def path(self, seed: int) -> Path:
        """Return the path of a seed's run; other settings give another path."""
        options = tuple(sorted((k, str(v)) for k, v in self.options.items()))
        model, task = str(self.options.get("model", "")), task_key(self.task)
        about = [model, task, asdict(self.size), options, self.experiment.version]
        return self.out / self.experiment.name / f"seed-{seed}-{short_hash(about)}.zarr"

    def measure(
        self, model: Model, seed: int, show: bool = False, batch_size: int | None = None
    ) -> None:
        """Measure a seed and save it.

        Raises
        ------
        FindingError
            If the model cannot do the task.
        StoreError
            If the folder cannot be written.
        """
        from ..results import make_tree, provenance, save

        folder = self.out / "selections"
        setting = Setting(model, self.task, seed, self.size, folder, show)
        with set_options(batch_size=batch_size), stage(f"seed {seed}", show):
            found = self.experiment.measure(setting)
        about = provenance(
            model, setting.test, experiment=self.experiment.name, size=asdict(self.size)
        )
        save(make_tree(found, {**about, "seed": seed}), self.path(seed))


def run_experiment(
    experiment: Experiment,
    model: Callable[[], Model],
    task: Task,
    out: Path,
    *,
    size: Size = FULL,
    options: Mapping[str, Any] | None = None,
    batch_size: int | None = None,
    show: bool = False,
    log: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Measure what is missing, judge, draw, and write everything.

    Parameters
    ----------
    experiment
        The experiment.
    model
        Function that returns the model; called if a seed is missing.
    task
        The task.
    out
        Folder for `NAME/seed-*.zarr`, `NAME.json`, `NAME.png` and `NAME.svg`.
    size
        `FULL` or `QUICK`.
    options
        Load options of the model, to distinguish measurements; "model" is its name.
    batch_size
        Prompts per batch.
    show
        Whether to show progress bars.
    log
        Called with lines about the progress.

    Returns
    -------
    dict
        Content of the JSON file.

    Raises
    ------
    FindingError
        If the model cannot do the task.
    StoreError
        If the folder cannot be written.
    """
    trial = Trial(experiment, task, out, size, dict(options or {}))
    for seed in size.seeds:
        path = trial.path(seed)
        if path.exists():
            log(f"{experiment.name}, seed {seed}: measured before ({path})")
        else:
            start = time.perf_counter()
            trial.measure(model(), seed, show, batch_size)
            log(f"{experiment.name}, seed {seed}: {time.perf_counter() - start:.0f} s")
    return conclude(trial, log)


def conclude(trial: Trial, log: Callable[[str], None] = print) -> dict[str, Any]:
    """Judge the measurements, draw them, and write the results.

    Returns
    -------
    dict
        Content of the JSON file.

    Raises
    ------
    StoreError
        If a seed is missing, or the folder cannot be written.
    """
    from ..results import open as open_run

    experiment, size, out = trial.experiment, trial.size, trial.out
    runs = [open_run(trial.path(seed)).load() for seed in size.seeds]
    judgement = experiment.judge(runs)
    if judgement.verdict not in VERDICTS:
        raise ValueError(f"{experiment.name} gives the verdict {judgement.verdict!r}")
    if len(runs) < 3:
        judgement.verdict = "undecided"
        judgement.reason = f"{len(runs)} seed where a verdict needs three. {judgement.reason}"
    result = _result(experiment, runs, judgement, size)
    _write(experiment, runs, judgement, result, out)
    log(f"{experiment.name}: {judgement.verdict}. {judgement.reason}")
    return result


def task_key(task: Task) -> str:
    """Return a task's name with a hash of its texts."""
    return f"{task.name}-{short_hash(task.texts)}"


def _result(
    experiment: Experiment, runs: Sequence[xr.DataTree], judgement: Judgement, size: Size
) -> dict[str, Any]:
    first = runs[0].attrs
    kept = ("model", "model_revision", "dtype", "quantization", "attention_kernel", "task")
    return {
        "number": experiment.number,
        "name": experiment.name,
        "title": experiment.title,
        "claim": experiment.claim,
        "paper": experiment.headline,
        "rule": " ".join(experiment.rule.split()),
        "verdict": judgement.verdict,
        "reason": judgement.reason,
        "numbers": {words: _plain(number) for words, number in judgement.numbers.items()},
        "tables": {
            title: {
                "columns": table["columns"],
                "rows": [[_plain(value) for value in row] for row in table["rows"]],
            }
            for title, table in judgement.tables.items()
        },
        "size": {**asdict(size), "seeds": list(size.seeds)},
        "subject": experiment.subject,
        "prompts": experiment.prompts,
        **{name: first[name] for name in kept},
        "labels": json.loads(first["labels"]),
        "provenance": {
            "seeds": [int(run.attrs["seed"]) for run in runs],
            "prompts_hash": [run.attrs["prompts_hash"] for run in runs],
            "created": [run.attrs["created"] for run in runs],
            "git_commit": [run.attrs["git_commit"] for run in runs],
            "device_map": json.loads(first["device_map"]),
            "versions": json.loads(first["versions"]),
        },
    }


def _plain(number: Any) -> Any:
    """Convert a number for JSON: an estimate becomes a dict, NaN becomes None."""
    if isinstance(number, Estimate):
        return {name: _plain(value) for name, value in number._asdict().items()}
    return None if isinstance(number, float) and math.isnan(number) else number


def _write(
    experiment: Experiment,
    runs: list[xr.DataTree],
    judgement: Judgement,
    result: dict[str, Any],
    out: Path,
) -> None:
    import matplotlib
    from matplotlib import pyplot as plt

    matplotlib.use("Agg")
    figure = experiment.draw(runs, judgement)
    try:
        for kind in ("png", "svg"):
            # Without a date, the same numbers give the same file.
            metadata = {"Date": None} if kind == "svg" else {}
            figure.savefig(out / f"{experiment.name}.{kind}", dpi=160, metadata=metadata)
        (out / f"{experiment.name}.json").write_text(json.dumps(result, indent=1) + "\n")
    except OSError as error:
        raise StoreError(f"{out} cannot be written: {error}") from error
    finally:
        plt.close(figure)
