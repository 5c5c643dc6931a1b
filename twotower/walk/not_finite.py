"""Prompts with logits that are not finite: found in every batch, with one warning per call.

A prompt is finite if, at the last position, its labels' logits and the largest logit of the
vocabulary are finite. Then the log-sum-exp is finite too, even if single logits are -inf.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import wraps
from typing import ParamSpec, TypeVar

import torch

from ..errors import NotFiniteWarning
from ..results.missing import named
from .batch import Batch, BatchAnswers
from .recorder import Donors, Recorder
from .views import End, LayerView, PassingView

P = ParamSpec("P")
T = TypeVar("T")

FINITE = "finite"
"""Name of the (prompt,) array in the results of `collect` that marks finite prompts."""


class Finite(Recorder):
    """Records which prompts of a batch have finite logits, including those of their donors.

    Parameters
    ----------
    answers
        Answers of the batch; None to check only the largest logit.
    donors
        Recorders of the donors' batches, which run first.
    """

    def __init__(self, answers: BatchAnswers | None, donors: Sequence[Watched] = ()) -> None:
        self.answers, self.given = answers, donors

    def finish(self, end: End) -> dict[str, torch.Tensor]:
        logits = end.logits
        finite = logits.amax(dim=-1).isfinite()
        if self.answers is not None:
            ids = self.answers.ids.on(logits.device)
            finite &= logits.gather(1, ids).isfinite().all(dim=-1)
            if self.answers.n_reads > 1:
                assert end.last_logits is not None
                last = end.last_logits[:, -self.answers.n_reads :].to(logits.device)
                read = last.amax(dim=-1).isfinite()
                steps = torch.arange(1 - read.shape[1], 1, device=read.device)
                reads = self.answers.reads.on(read.device)
                mine = steps >= reads[:, :1] - reads[:, -1:]
                finite &= (read | ~mine).all(dim=-1)
        for donor in self.given:
            finite &= donor.finite[0].to(finite.device)
        return {FINITE: finite}


class Watched(Recorder):
    """Recorder of donors that also records whether their logits are finite."""

    def __init__(self, recorder: Recorder) -> None:
        self.recorder, self.watch = recorder, Finite(None)
        self.finite: list[torch.Tensor] = []

    def layer(self, view: LayerView) -> None:
        self.recorder.layer(view)

    def passing(self, view: PassingView) -> None:
        self.recorder.passing(view)

    def finish(self, end: End) -> dict[str, torch.Tensor]:
        self.finite.append(self.watch.finish(end)[FINITE])
        return self.recorder.finish(end)


def watch(batch: Batch, donors: Iterable[Donors]) -> Finite:
    """Return the recorder that finds the finite prompts of a batch, and watch the donors too."""
    watched = []
    for donor in donors:
        donor.recorder = Watched(donor.recorder)
        watched.append(donor.recorder)
    return Finite(batch.answers, watched)


@dataclass
class Notice:
    """Prompts and values that are not finite, in one call of a measure.

    Attributes
    ----------
    prompts
        By kind of prompts: indices of those that are not finite, and number of all.
    values
        By group of the schema: number of values that are not finite in finite prompts.
    """

    prompts: dict[str, tuple[set[int], int]] = field(default_factory=dict)
    values: dict[str, int] = field(default_factory=dict)

    def text(self) -> str:
        """Return the text of the warning; empty if everything is finite."""
        parts = []
        for words, (numbers, total) in self.prompts.items():
            found = named(numbers, total, words)
            if words == "prompts":
                parts.append(
                    f"{found} have logits that are not finite: their values are missing (NaN), "
                    "and no mean, score or choice of heads counts them"
                )
            else:
                parts.append(f"{found} have logits that are not finite and are left out")
        if values := sum(self.values.values()):
            parts.append(f"{values} single values of finite prompts are not finite: they are NaN")
        if not parts:
            return ""
        return f"{'; '.join(parts)}. Load the model with dtype='float32' or 'bfloat16'"


_notice: ContextVar[Notice | None] = ContextVar("notice", default=None)


def note_missing(words: str, numbers: Iterable[int], total: int) -> None:
    """Record prompts that are not finite, for the warning at the end of the measure.

    Parameters
    ----------
    words
        Kind of prompts, such as "reference prompts".
    numbers, total
        Indices of the prompts that are not finite, and number of all prompts.
    """
    numbers = set(map(int, numbers))
    if numbers:
        with _open_notice() as notice:
            known, _ = notice.prompts.get(words, (set(), total))
            notice.prompts[words] = (known | numbers, total)


def note_values(group: str, count: int) -> None:
    """Record the number of values of a group that are not finite in finite prompts."""
    if count:
        with _open_notice() as notice:
            notice.values[group] = max(count, notice.values.get(group, 0))


def warns_once(measure: Callable[P, T]) -> Callable[P, T]:
    """Decorate a measure to give one warning for all its walks."""

    @wraps(measure)
    def run(*arguments: P.args, **options: P.kwargs) -> T:
        with _open_notice():
            return measure(*arguments, **options)

    return run


@contextmanager
def collect_notices() -> Iterator[Notice]:
    """Collect prompts and values that are not finite without a warning; the caller reports them."""
    notice = Notice()
    token = _notice.set(notice)
    try:
        yield notice
    finally:
        _notice.reset(token)


@contextmanager
def _open_notice() -> Iterator[Notice]:
    """Yield the notice of the running call, or a new one that warns at its end."""
    known = _notice.get()
    if known is not None:
        yield known
        return
    with collect_notices() as notice:
        yield notice
    if text := notice.text():
        warnings.warn(text, NotFiniteWarning, stacklevel=outside())


def outside() -> int:
    """Return the `stacklevel` of the user's frame, the first one outside the package."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and _own(frame.f_globals.get("__name__", "")):
        frame, level = frame.f_back, level + 1
    return level


def _own(module: str) -> bool:
    return module.partition(".")[0] in ("twotower", "contextlib")
