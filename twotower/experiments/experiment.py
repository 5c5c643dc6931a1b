"""An experiment: a claim, a measurement for each seed, and a verdict by a stated rule.

Each file in experiments/ makes one `Experiment`; `run.py` carries it out.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import FindingError
from ..progress import stage
from ..statistics import Estimate, above_chance

if TYPE_CHECKING:
    import xarray as xr
    from matplotlib.figure import Figure

    from ..head import Head
    from ..models import Model
    from ..prompts import Prompts, Task
    from ..results import Variable

VERDICTS = ("supported", "not supported", "undecided")
SIGNIFICANT = 0.05


@dataclass(frozen=True)
class Size:
    """Numbers of prompts, heads and seeds in an experiment.

    Attributes
    ----------
    seeds
        Random seeds; each draws its own prompts.
    n_fit, n_test
        Prompts for choosing heads and settings, and for testing them.
    shots
        Demonstrations per label.
    k
        Number of chosen heads.
    n_random
        Draws of random heads.
    n_task
        Prompts per task in experiments on many tasks.
    """

    name: str
    seeds: tuple[int, ...]
    n_fit: int
    n_test: int
    shots: int
    k: int
    n_random: int
    n_task: int


FULL = Size("full", (0, 1, 2), n_fit=60, n_test=60, shots=8, k=12, n_random=3, n_task=24)
QUICK = Size("quick", (0,), n_fit=16, n_test=12, shots=4, k=12, n_random=1, n_task=8)
"""For the tests; fewer than three seeds give no verdict."""


@dataclass
class Setting:
    """Model, task and prompts of a measurement, for one seed.

    Attributes
    ----------
    model, task, seed, size
        The measured model and task, the seed, and the numbers of prompts and heads.
    folder
        Folder for selection runs, which experiments share.
    show
        Whether to show progress bars.
    """

    model: Model
    task: Task
    seed: int
    size: Size
    folder: Path
    show: bool = False

    def stage(self, title: str) -> AbstractContextManager[None]:
        """Return a context manager that gives progress a title."""
        return stage(f"seed {self.seed}: {title}", self.show)

    def build(self, n_fit: int | None = None, n_test: int | None = None, **settings: Any) -> Any:
        """Build prompts for choosing and for testing, which share no text.

        Parameters
        ----------
        n_fit, n_test
            Numbers of prompts; by default those of `size`.
        **settings
            As for `twotower.build_prompts`; `task` for another task.
        """
        from ..prompts import build_prompts

        n_fit, n_test = n_fit or self.size.n_fit, n_test or self.size.n_test
        task = settings.pop("task", self.task)
        settings = {"shots": self.size.shots, "seed": self.seed, **settings}
        prompts = build_prompts(self.model, task, n=n_fit + n_test, **settings)
        return prompts.split(n_fit / (n_fit + n_test), seed=self.seed)

    @cached_property
    def halves(self) -> tuple[Prompts, Prompts]:
        """Fitting and test prompts of the task."""
        found: tuple[Prompts, Prompts] = self.build()
        return found

    @property
    def fit(self) -> Prompts:
        """Prompts for choosing heads and settings."""
        return self.halves[0]

    @property
    def test(self) -> Prompts:
        """Prompts for testing them."""
        return self.halves[1]

    @cached_property
    def selection(self) -> xr.DataTree:
        """Predictions, effects at the last position and attribution of the fitting prompts.

        Raises
        ------
        FindingError
            If the model is not better than chance at the task: there is nothing to explain.
        """
        return self.select(self.fit)

    def select(self, prompts: Prompts) -> xr.DataTree:
        """Measure the same for any prompts, or open it from the folder."""
        from filelock import FileLock

        from ..measures.analyze import analyze
        from ..results import open as open_run
        from ..results import save

        about = [self.model.name, self.model.revision, self.model.quantization]
        about += [str(self.model.dtype), prompts.hash]
        path = self.folder / f"{prompts.task_name}-{short_hash(about)}.zarr"
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path.with_suffix(".lock"))
        try:
            with lock:  # another worker may measure the same prompts
                if not path.exists():
                    measures = ("predictions", "effects", "attribution")
                    with self.stage("sweeping every head"):
                        run = analyze(self.model, prompts, measures=measures)
                    check_task(run, self.model.name)
                    save(run, path)
        finally:
            Path(lock.lock_file).unlink(missing_ok=True)
        run = open_run(path).load()
        check_task(run, self.model.name)
        return run

    @cached_property
    def heads(self) -> list[Head]:
        """In-context heads: largest effect on the fitting prompts, strongest first."""
        from ..measures.choose import in_context_heads

        return in_context_heads(self.selection, self.size.k)

    @cached_property
    def writers(self) -> list[Head]:
        """Heads that write the answer: largest label logit on the fitting prompts."""
        from ..measures.choose import in_context_heads

        return in_context_heads(self.selection, self.size.k, by="label_logit")

    def random_heads(
        self, k: int | None = None, like: Sequence[Head] = (), without: Sequence[Head] = ()
    ) -> list[list[Head]]:
        """Draw sets of k random heads.

        Parameters
        ----------
        k
            Number of heads; by default that of `size`.
        like
            If given, each draw has as many heads per layer as `like`, if the layer has enough
            others.
        without
            Heads to exclude; by default the in-context heads.
        """
        from .random_heads import random_heads

        barred = {*(without or self.heads), *like}
        seed = [self.seed, 23, len(like)]
        k = k or self.size.k
        return random_heads(self.model.heads, k, self.size.n_random, seed, barred, like)

    def table(
        self,
        variables: Mapping[str, tuple[Variable, Any]],
        coordinates: Mapping[str, Any],
        prompts: Prompts | None = None,
        **settings: Any,
    ) -> xr.Dataset:
        """Make a table of the experiment's own variables, with provenance."""
        from ..results import make_table, provenance

        about = provenance(self.model, prompts or self.test, **settings)
        return make_table(variables, coordinates, about)


def check_task(run: xr.DataTree, name: str) -> None:
    """Check that a model is better than chance at a task.

    Raises
    ------
    FindingError
        With the accuracy and the p-value of an exact binomial test.
    """
    from ..results import measured_prompts

    predictions = measured_prompts(run.children["predictions"])
    correct = predictions["correct"].values
    chance = 1 / predictions.sizes["label"]
    p = above_chance(correct, chance)
    if not p < SIGNIFICANT:
        raise FindingError(
            f"{name} cannot do {run.attrs['task']}: {int(correct.sum())} of {len(correct)} prompts "
            f"right where chance is {chance:.2f} (exact binomial test, p = {p:.2f}); there is "
            "nothing to explain"
        )


@dataclass
class Judgement:
    """Result of an experiment.

    Attributes
    ----------
    verdict
        One of `VERDICTS`.
    reason
        A sentence with the decisive numbers.
    numbers
        By description: estimates with intervals and n, or plain numbers.
    tables
        By title: {"columns": names, "rows": lists of estimates, numbers and texts}, for the page.
    """

    verdict: str
    reason: str
    numbers: dict[str, Estimate | float | int | str] = field(default_factory=dict)
    tables: dict[str, dict[str, list[Any]]] = field(default_factory=dict)


@dataclass(frozen=True)
class Experiment:
    """A claim and its test.

    Attributes
    ----------
    number, name, title
        Its place in the suite, its name on the command line, its title.
    claim
        The claim in words.
    headline
        The paper's result.
    rule
        Rule for the verdict, stated before the numbers.
    measure
        Function of a `Setting`; returns datasets by name.
    judge
        Function of the runs of all seeds; returns a `Judgement`.
    draw
        Function of the runs and the judgement; returns a figure.
    task
        The default task.
    subject
        Description of the measured models and tasks, if they are not the ones given.
    prompts
        Prompts of a seed in words, if they are not `n_fit` and `n_test` of the task.
    version
        Raise it when the measurement changes, so that older measurements are not reused.
    """

    number: int
    name: str
    title: str
    claim: str
    headline: str
    rule: str
    measure: Callable[[Setting], Mapping[str, xr.Dataset]]
    judge: Callable[[list[xr.DataTree]], Judgement]
    draw: Callable[[list[xr.DataTree], Judgement], Figure]
    task: str = "animals-cities"
    subject: str = ""
    prompts: str = ""
    version: int = 1


def short_hash(about: Any) -> str:
    """Return ten hexadecimal digits that distinguish settings, for the name of a store."""
    return hashlib.sha256(json.dumps(about, default=str).encode()).hexdigest()[:10]
