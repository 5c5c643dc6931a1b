"""A worker: one model replica that measures units, in this process or in a Ray actor."""

from __future__ import annotations

import os
import socket
import time
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from ..errors import StoreError

if TYPE_CHECKING:
    from ..measures.measure import Measure
    from ..models import Model
    from ..prompts import Prompts
    from ..results.units import Unit, UnitStore
    from .configuration import Configuration


SAME = (
    "prompts_hash",
    "tokenizer_hash",
    "model_revision",
    "weights_hash",
    "dtype",
    "quantization",
)
"""Attributes in which all units of a run must agree."""


@dataclass(frozen=True)
class Report:
    """Times of one unit.

    Attributes
    ----------
    seconds
        Wall time of measuring and writing.
    writing
        Part of it spent on writing, in seconds.
    worker
        Host and process.
    """

    seconds: float
    writing: float
    worker: str


def worker_name() -> str:
    """Return host and process id of this process."""
    return f"{socket.gethostname()}:{os.getpid()}"


class Worker:
    """Measures units of a run and writes them into its store.

    Holds one model at a time: that of the last unit.

    Parameters
    ----------
    config
        The run.
    """

    def __init__(self, config: Configuration) -> None:
        self.config = config
        self.name = worker_name()
        self._model: tuple[str, Model] | None = None
        self._prompts: tuple[str, Prompts] | None = None

    @cached_property
    def store(self) -> UnitStore:
        """The run's store."""
        from ..results.units import UnitStore

        return UnitStore(self.config.store, self.config.patience)

    @property
    def measures(self) -> list[Measure]:
        """The measures of the run."""
        from ..measures.analyze import choose_measures

        config = self.config
        return choose_measures(
            config.measures, norm=config.norm, logprobs=config.logprobs, keep=config.keep
        )

    def create(self, attributes: dict[str, Any]) -> list[str]:
        """Make the store; measure the first prompt of each part to learn its variables.

        Parameters
        ----------
        attributes
            Attributes of the root.

        Returns
        -------
        list of str
            Lines that describe models and prompts.
        """
        from ..results.units import plan_units

        parts, lines = {}, []
        for part in self.config.parts:
            model, prompts = self.part(part)
            parts[part] = _unmeasured(model, prompts, self.measures)
            lines += [repr(model), repr(prompts)]
        size = self.config.unit_size
        units = plan_units({part: self.config.n for part in parts}, size)
        self.store.create(parts, units, size, attributes, self.config.overwrite)
        return list(dict.fromkeys(lines))

    def part(self, part: str) -> tuple[Model, Prompts]:
        """Return the model and all prompts of a part."""
        config = self.config.parts[part]
        if self._model is None or self._model[0] != config.model[0]:
            self._model = self._prompts = None  # never hold two models
            self._model = (config.model[0], config.load_model())
        model = self._model[1]
        if self._prompts is None or self._prompts[0] != part:
            self._prompts = (part, config.build_prompts(model, config.load_task()))
        return model, self._prompts[1]

    def __call__(self, unit: Unit) -> Report:
        """Measure a unit, write it, and mark it as done.

        Raises
        ------
        StoreError
            If the store was made for other prompts, or cannot be written.
        """
        from ..measures.analyze import run_datasets
        from ..measures.collect import collect
        from ..options import set_options
        from ..results.units import DONE, report_missing
        from ..walk.not_finite import collect_notices

        start = time.perf_counter()
        known = self._prompts and self._prompts[0]
        model, prompts = self.part(unit.part)
        if known != unit.part:
            self._check_same(model, prompts, unit.part)
            start = time.perf_counter()  # do not count loading
        some = prompts[unit.start : unit.stop]
        measures = self.measures
        # Warnings about prompts that are not finite come once, at the end of the run.
        with collect_notices(), set_options(batch_size=self.config.batch_size):
            found = collect(model, some, measures)
            groups, _ = run_datasets(model, some, measures, found)
        middle = time.perf_counter()
        self.store.write(unit, groups)
        end = time.perf_counter()
        report = Report(end - start, end - middle, self.name)
        self.store.mark(
            unit,
            DONE,
            seconds=report.seconds,
            finished=time.time(),
            worker=report.worker,
            error="",
            not_finite=report_missing(unit, groups),
            proof=model.proof.describe(),
        )
        return report

    def _check_same(self, model: Model, prompts: Prompts, part: str) -> None:
        """Check that the store was made with the same prompts and model."""
        from ..results import provenance

        if not self.store.place.holds():
            raise StoreError(
                f"{self.store.place} is not visible to {self.name}: every worker must reach it"
            )
        about, now = self.store.attributes(part), provenance(model, prompts)
        for name in SAME:
            # Weights that are offloaded or on a server have no hash.
            if about[name] != now[name] and (name != "weights_hash" or (about[name] and now[name])):
                raise StoreError(
                    f"{self.store.place} was started with another {name.replace('_', ' ')} "
                    f"({about[name]}; now {now[name]}); use --overwrite, or another --output"
                )


def _unmeasured(model: Model, prompts: Prompts, measures: list[Measure]) -> Any:
    """Return a part's datasets without values, and the attributes of its root."""
    import numpy as np

    from ..measures.analyze import run_datasets
    from ..measures.collect import collect, kept_positions
    from ..measures.datasets import kept_columns
    from ..measures.scores import two_tower_scores
    from ..results import GROUPS, make_tree
    from ..walk.not_finite import FINITE, collect_notices

    with collect_notices():
        first = collect(model, prompts[:1], measures)
    kept = kept_columns(prompts, kept_positions(measures))
    positions = prompts.n_positions if kept is None else kept.shape[1]
    blank = [
        {
            name: np.broadcast_to(
                np.zeros((), dtype=array.dtype),
                [
                    {"prompt": len(prompts), "position": positions}.get(dim, size)
                    for dim, size in zip(GROUPS[measure.group][name].dims, array.shape, strict=True)
                ],
            )
            for name, array in arrays.items()
            if name != FINITE
        }
        for measure, arrays in zip(measures, first, strict=True)
    ]
    groups, about = run_datasets(model, prompts, measures, blank)
    if {"qk", "ov"} <= set(groups) and not prompts.answers.by_prompt:
        with collect_notices():
            one, about_one = run_datasets(model, prompts[:1], measures, first)
        scores = two_tower_scores(make_tree(one, about_one))
        about_scores = {**groups["qk"].attrs, "twotower_group": "scores", "settings": "{}"}
        about_scores["not_finite_values"] = 0
        groups["scores"] = (scores * np.nan).assign_attrs(about_scores)
        for name, array in scores.data_vars.items():
            groups["scores"][name].attrs = array.attrs
    return groups, about
