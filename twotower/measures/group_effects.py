"""Group effects: the exact drop of the margin when several heads are changed together."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from itertools import chain, combinations
from typing import TYPE_CHECKING, Any

import numpy as np

from ..checks import is_list, shown, whole, yes_or_no
from ..edits.changes import Change, Zero, check_change
from ..errors import InputError
from ..head import check_heads
from ..prompts.positions import named, position_mask
from ..results import measured_prompts
from ..results.forms import with_dims
from ..sweep.counterfactuals import Group, plan
from ..sweep.prepare import prepare_sweep
from ..walk.not_finite import FINITE
from .collect import collect
from .datasets import Arrays, dataset
from .effects import sweep_key
from .measure import MakeRecorder, Measure
from .measurement import measurement

if TYPE_CHECKING:
    import xarray as xr

    from ..head import Head
    from ..models import Model
    from ..prompts import Prompts
    from ..prompts.positions import Positions

LARGEST_POOL = 12
"""Largest pool of which all subsets can be swept; 12 heads have 4,095 subsets."""


@measurement
def group_effects(
    model: Model,
    prompts: Prompts,
    groups: Iterable[Sequence[tuple[int, int]]],
    positions: Positions = "last",
    *,
    to: Change = Zero(),
    logprobs: bool = True,
) -> xr.Dataset:
    """Return the effect of changing groups of heads, one group at a time.

    Every number equals that of a separate forward. Groups with the same heads in lower layers
    share the computation up to the layer where they differ.

    Parameters
    ----------
    model, prompts
        Model and prompts to measure.
    groups
        Distinct groups of heads.
    positions, to, logprobs
        As in `head_effects`.

    Returns
    -------
    xarray.Dataset
        margin_drop (prompt, group); n_heads (group); logprob_drop (prompt, group, label).
        `group` names the heads, such as "17.0+18.6", in the given order of groups. The
        attribute `forwards` is the cost of the sweep in plain forwards of a prompt;
        `separate_forwards` is the number of separate forwards replaced.

    Raises
    ------
    InputError
        If a group is empty or given twice, a head is out of range, or as `head_effects`.
    """
    checked = _checked(groups, model)
    measure = GroupEffects(tuple(checked), positions, to, logprobs)
    arrays = group_arrays(measure, model, prompts)
    arrays["n_heads"] = np.array([len(group) for group in checked])
    coordinates = {"group": [name_of(group) for group in checked]}
    found = dataset(
        "group_effects", arrays, model, prompts, measure.settings(), coordinates=coordinates
    )
    return found.assign_attrs(sweep_cost(model, prompts, checked, positions))


@dataclass(frozen=True, eq=False)
class GroupEffects(Measure):
    """The measure behind `group_effects`, with its settings."""

    group = "group_effects"
    scores_answers = True

    groups: tuple[Group, ...]
    positions: Positions = "last"
    to: Change = Zero()
    logprobs: bool = True

    def __post_init__(self) -> None:
        check_change(self.to)
        yes_or_no("logprobs", self.logprobs)

    def prepare(self, model: Model, prompts: Prompts) -> MakeRecorder:
        return prepare_sweep(
            model,
            prompts,
            self.positions,
            self.to,
            groups=sorted(self.groups),
            logprobs=self.logprobs,
        )

    def settings(self) -> dict[str, Any]:
        return {"positions": named(self.positions), **self.to.describe()}

    @property
    def shares_beginnings(self) -> bool:
        return self.positions != "last" if isinstance(self.positions, str) else True

    def memory_key(self) -> Hashable:
        key = sweep_key(self.positions, self.to, self.logprobs)
        return (*key, len(self.groups).bit_length())


def group_arrays(
    measure: GroupEffects, model: Model, prompts: Prompts, title: str | None = None
) -> Arrays:
    """Return a sweep's arrays (prompt, group, ...), with groups in the given order."""
    (arrays,) = collect(model, prompts, [measure], title=title)
    order = sorted(range(len(measure.groups)), key=measure.groups.__getitem__)
    back = np.argsort(order)
    return {name: x if name == FINITE else x[:, back] for name, x in arrays.items()}


def _checked(groups: Iterable[Sequence[tuple[int, int]]], model: Model) -> list[Group]:
    if not is_list(groups):
        raise InputError(f"groups={shown(groups)} must be a list of groups of (layer, head)")
    found: list[Group] = []
    for group in groups:
        heads = check_heads(group, model)
        if not heads:
            raise InputError("a group is empty")
        found.append(tuple(sorted(heads)))
    if not found:
        raise InputError("there are no groups")
    if len(set(found)) != len(found):
        twice = next(g for g in found if found.count(g) > 1)
        raise InputError(f"the group {name_of(twice)} is given twice")
    return found


def name_of(group: Group) -> str:
    """Return a group's name, such as "17.0+18.6"."""
    return "+".join(f"{layer}.{head}" for layer, head in group)


def sweep_cost(
    model: Model, prompts: Prompts, groups: Sequence[Group], positions: Positions
) -> dict[str, float]:
    """Return a sweep's cost and the number of forwards it replaces, as attributes."""
    return {
        "forwards": round(forwards(model, prompts, groups, positions), 2),
        "separate_forwards": len(groups) + 1,
    }


def forwards(
    model: Model, prompts: Prompts, groups: Sequence[Group], positions: Positions
) -> float:
    """Return the cost of a sweep in plain forwards of a mean prompt, including the clean one.

    Counts positions times blocks. Ignores attention, the unembedding, and the savings from
    beginnings that prompts share.
    """
    at = position_mask(prompts, positions)
    real = prompts.token_id >= 0
    changed = (np.logical_or.accumulate(at, axis=1) & real).sum(axis=1).clip(min=1)
    blocks = plan(groups, model.n_layers).row_layers
    return 1 + float((changed / prompts.lengths).mean()) * blocks / model.n_layers


@measurement
def subset_effects(
    model: Model,
    prompts: Prompts,
    pool: Sequence[tuple[int, int]],
    positions: Positions = "last",
    *,
    to: Change = Zero(),
    logprobs: bool = True,
) -> xr.Dataset:
    """Return the exact effect of changing every subset of a pool of heads.

    Parameters
    ----------
    model, prompts
        Model and prompts to measure.
    pool
        At most 12 heads, which have 4,095 subsets.
    positions, to, logprobs
        As in `head_effects`.

    Returns
    -------
    xarray.Dataset
        As from `group_effects`, smaller subsets first.

    Raises
    ------
    InputError
        If the pool is empty or too large, or as `group_effects`.
    """
    heads = check_heads(pool, model)
    if not 1 <= len(heads) <= LARGEST_POOL:
        raise InputError(
            f"a pool of {len(heads)} heads has {2 ** len(heads) - 1} subsets; give 1 to "
            f"{LARGEST_POOL} heads, or choose greedily (greedy_heads)"
        )
    subsets = chain.from_iterable(combinations(heads, k + 1) for k in range(len(heads)))
    return group_effects(model, prompts, subsets, positions, to=to, logprobs=logprobs)


def strongest_group(effects: xr.Dataset, k: int) -> list[Head]:
    """Return the k heads that lower the margin most together, by the mean over prompts.

    Parameters
    ----------
    effects
        Result of `group_effects` or `subset_effects`.
    k
        Number of heads.

    Returns
    -------
    list of Head

    Raises
    ------
    InputError
        If no group has k heads, no effect is finite, or the dataset has no effects of groups.
    """
    from ..head import Head

    whole("k", k, 1)
    dims = getattr(getattr(effects, "margin_drop", None), "dims", ())
    if not {"prompt", "group"} <= set(dims) or "n_heads" not in effects:
        raise InputError("strongest_group needs the result of group_effects or subset_effects")
    effects = with_dims(measured_prompts(effects), "effects", "prompt", "group")
    mean = effects["margin_drop"].mean("prompt")
    mean = mean.isel(group=np.flatnonzero(effects["n_heads"].values == k))
    if not mean.size:
        raise InputError(f"no group has {k} heads")
    name = str(mean["group"].values[largest(mean.values)])
    return [Head(*map(int, part.split("."))) for part in name.split("+")]


def largest(means: np.ndarray) -> int:
    """Return the index of the largest mean, ignoring NaN.

    Raises
    ------
    InputError
        If all are NaN.
    """
    if not np.isfinite(means).any():
        raise InputError(
            "no effect is finite, so nothing can be chosen: load the model with "
            "dtype='float32' or 'bfloat16'"
        )
    return int(np.nanargmax(means))
