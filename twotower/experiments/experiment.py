"""What an experiment is: a claim, a measurement for each seed, and a verdict by a stated rule.

The files in experiments/ each make one `Experiment`; `experiment_run.py` carries it out.
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
    """How much is measured: all numbers of prompts and seeds of the suite.

    Attributes
    ----------
    seeds
        Each draws prompts of its own.
    n_fit, n_test
        Prompts on which heads and settings are chosen, and on which they are tested.
    shots
        Demonstrations per label.
    k
        Number of heads that are chosen.
    n_random
        Draws of random heads.
    n_task
        Prompts of a task where many tasks are compared.
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
"""For the tests; with fewer than three seeds no verdict is given."""


@dataclass
class Setting:
    """What a measurement works with, for one seed.

    Attributes
    ----------
    model, task, seed, size
        What is measured, and how much.
    folder
        Where selections are kept, which experiments have in common.
    show
        Whether bars are shown.
    """

    model: Model
    task: Task
    seed: int
    size: Size
    folder: Path
    show: bool = False

    def stage(self, title: str) -> AbstractContextManager[None]:
        """Return a `with` block in which progress has a title."""
        return stage(f"seed {self.seed}: {title}", self.show)

    def build(self, n_fit: int | None = None, n_test: int | None = None, **settings: Any) -> Any:
        """Prompts for choosing and for testing, without a text in common.

        Parameters
        ----------
        n_fit, n_test
            Numbers of prompts; by default the size's.
        **settings
            As `twotower.build_prompts` takes them; `task` for another task.
        """
        from ..prompts import build_prompts

        n_fit, n_test = n_fit or self.size.n_fit, n_test or self.size.n_test
        task = settings.pop("task", self.task)
        settings = {"shots": self.size.shots, "seed": self.seed, **settings}
        prompts = build_prompts(self.model, task, n=n_fit + n_test, **settings)
        return prompts.split(n_fit / (n_fit + n_test), seed=self.seed)

    @cached_property
    def halves(self) -> tuple[Prompts, Prompts]:
        """The prompts of the task."""
        found: tuple[Prompts, Prompts] = self.build()
        return found

    @property
    def fit(self) -> Prompts:
        """Prompts on which heads and settings are chosen."""
        return self.halves[0]

    @property
    def test(self) -> Prompts:
        """Prompts on which they are tested."""
        return self.halves[1]

    @cached_property
    def selection(self) -> xr.DataTree:
        """Predictions, effects at the last position and attribution of the fitting prompts.

        Raises
        ------
        FindingError
            If the model is not better than chance at the task, so that there is nothing
            to explain.
        """
        return self.select(self.fit)

    def select(self, prompts: Prompts) -> xr.DataTree:
        """The same of any prompts; kept in the folder."""
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
            with lock:  # another worker may be at the same
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
        """The in-context heads: largest effect on the fitting prompts, strongest first."""
        from ..measures.choose import in_context_heads

        return in_context_heads(self.selection, self.size.k)

    @cached_property
    def writers(self) -> list[Head]:
        """The heads that write the answer: largest label logit on the fitting prompts."""
        from ..measures.choose import in_context_heads

        return in_context_heads(self.selection, self.size.k, by="label_logit")

    def random_heads(
        self, k: int | None = None, like: Sequence[Head] = (), without: Sequence[Head] = ()
    ) -> list[list[Head]]:
        """Draws of k random heads.

        Parameters
        ----------
        k
            Number of heads; by default the size's.
        like
            If given, each draw has as many heads of each layer as there are here (as far
            as the layer has others).
        without
            Heads that are not drawn; by default the in-context heads.
        """
        import numpy as np

        rng = np.random.default_rng([self.seed, 23, len(like)])
        barred = {*(without or self.heads), *like}
        draws = []
        for _ in range(self.size.n_random):
            left = [head for head in self.model.heads if head not in barred]
            order = [left[i] for i in rng.permutation(len(left))]
            if like:
                chosen = []
                for layer in sorted({head.layer for head in like}):
                    wanted = sum(head.layer == layer for head in like)
                    chosen += [head for head in order if head.layer == layer][:wanted]
                draws.append(chosen)
            else:
                draws.append(order[: k or self.size.k])
        return draws

    def table(
        self,
        variables: Mapping[str, tuple[Variable, Any]],
        coordinates: Mapping[str, Any],
        prompts: Prompts | None = None,
        **settings: Any,
    ) -> xr.Dataset:
        """A table of the experiment's own variables, with provenance."""
        from ..results import make_table, provenance

        about = provenance(self.model, prompts or self.test, **settings)
        return make_table(variables, coordinates, about)


def check_task(run: xr.DataTree, name: str) -> None:
    """Refuse a task at which a model is not better than chance.

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
    """What an experiment found.

    Attributes
    ----------
    verdict
        One of `VERDICTS`.
    reason
        In words, with the numbers that decided.
    numbers
        By what they are, in words: estimates with intervals and n, or plain numbers.
    """

    verdict: str
    reason: str
    numbers: dict[str, Estimate | float | int | str] = field(default_factory=dict)


@dataclass(frozen=True)
class Experiment:
    """A claim and how it is put to the test.

    Attributes
    ----------
    number, name, title
        Its place in the suite, its name on the command line, its title.
    claim
        What is claimed, in words.
    headline
        What the paper reports of it.
    rule
        How the verdict is reached; written before the numbers.
    measure
        Takes a `Setting`; gives datasets by name.
    judge
        Takes the runs of all seeds; gives a `Judgement`.
    draw
        Takes the runs and the judgement; gives a figure.
    task
        The task it is run on unless another is named.
    subject
        What is measured, in words, where it is not the model and task that were named.
    version
        Raised when what is measured changes, so that older measurements are not taken.
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
    version: int = 1


def short_hash(about: Any) -> str:
    """Ten digits that tell settings apart, for the name of a store."""
    return hashlib.sha256(json.dumps(about, default=str).encode()).hexdigest()[:10]
