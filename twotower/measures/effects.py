"""Head effects: the exact drop of the margin when each head is changed, for all heads."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..checks import yes_or_no
from ..edits.changes import Change, Zero, check_change
from ..options import option
from ..prompts.positions import named
from ..sweep.prepare import prepare_sweep
from .collect import run
from .measure import MakeRecorder, Measure

if TYPE_CHECKING:
    import xarray as xr

    from ..models import Model
    from ..prompts import Prompts
    from ..prompts.positions import Positions


def head_effects(
    model: Model,
    prompts: Prompts,
    positions: Positions = "last",
    *,
    to: Change = Zero(),
    logprobs: bool = True,
) -> xr.Dataset:
    """Return the effect of changing every head, one at a time.

    Every number equals that of a separate forward with the head's output changed. But one walk
    over the layers sweeps all heads (see `twotower.sweep.rows`). At the last position this
    costs about one more forward.

    Parameters
    ----------
    model, prompts
        Model and prompts to measure.
    positions
        Positions at which a head's output is changed: "last", "labels", "all", `twotower.at`,
        or a boolean (prompt, position) array. "labels" changes the outputs at label positions,
        not what the last position reads from there.
    to
        New output of the head: `Zero`, `Mean`, `Resample`, `From` or `Times`.
    logprobs
        Whether to return drops of log-probabilities too. They need the logits of the whole
        vocabulary for every head; margins need only those of the labels.

    Returns
    -------
    xarray.Dataset
        margin_drop (prompt, layer, head): clean minus changed margin, positive if the head
        helps. logprob_drop (prompt, layer, head, label), in nat.

    Raises
    ------
    InputError
        If positions or change do not fit the prompts, donors cannot be aligned, or the option
        `memory_budget` is too small for a single row; the message says how much is needed.
    """
    return run(model, prompts, Effects(positions, to, logprobs))


@dataclass(frozen=True, eq=False)
class Effects(Measure):
    """The measure behind `head_effects`, with its settings."""

    group = "effects"
    scores_answers = True

    positions: Positions = "last"
    to: Change = Zero()
    logprobs: bool = True

    def __post_init__(self) -> None:
        check_change(self.to)
        yes_or_no("logprobs", self.logprobs)

    def prepare(self, model: Model, prompts: Prompts) -> MakeRecorder:
        return prepare_sweep(model, prompts, self.positions, self.to, logprobs=self.logprobs)

    def settings(self) -> dict[str, Any]:
        return {"positions": named(self.positions), **self.to.describe()}

    @property
    def shares_beginnings(self) -> bool:
        # Rows at the last position cannot share beginnings.
        return self.positions != "last" if isinstance(self.positions, str) else True

    def memory_key(self) -> Hashable:
        return (*sweep_key(self.positions, self.to, self.logprobs), 0)


def sweep_key(positions: Positions, to: Change, logprobs: bool) -> tuple[Hashable, ...]:
    """Return the settings that decide how much memory a sweep's batch takes, except its groups."""
    where = positions if isinstance(positions, str) else "given"
    return ("sweep", where, type(to).__name__, logprobs, option("memory_budget"))
