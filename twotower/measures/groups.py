"""Heads together: effects of pairs, of groups, of all subsets of a pool, and greedy choice."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain, combinations
from typing import TYPE_CHECKING, Any

import numpy as np

from ..checks import whole
from ..errors import InputError
from ..intervention import check_heads
from ..results import measured_prompts
from ..statistics import mean_known
from .collect import Arrays, dataset
from .counterfactuals import Group, plan
from .edits import position_mask
from .effects import change_settings, sweep
from .measure import measure
from .missing import FINITE, tell_values

if TYPE_CHECKING:
    import xarray as xr

    from ..head import Head
    from ..intervention import Positions
    from ..models import Model
    from ..prompts import Prompts

LARGEST_POOL = 12
"""Heads of which all subsets are swept; 12 have 4,095."""

CHANGE = ("ablation", "reference", "seed", "factor")
"""What says to what heads are changed, as in `head_effects`."""


@measure
def group_effects(
    model: Model,
    prompts: Prompts,
    groups: Iterable[Sequence[Head]],
    positions: Positions = "last",
    *,
    logprobs: bool = False,
    memory_budget: int | str | None = None,
    batch_size: int | None = None,
    progress: bool | str = False,
    **change: Any,
) -> xr.Dataset:
    """Effect of changing groups of heads, each group together.

    Every number equals that of a separate forward. Groups that share their lower heads
    share the work below the layer in which they part.

    Parameters
    ----------
    model, prompts
        What is measured.
    groups
        Groups of heads, no two alike.
    positions
        Where heads' outputs are changed, as in `head_effects`.
    logprobs
        Whether to give drops of log-probabilities, too.
    memory_budget, batch_size, progress
        As in `head_effects`.
    **change
        What the heads' outputs are changed to: `ablation`, `reference`, `seed` and
        `factor`, as in `head_effects`.

    Returns
    -------
    xarray.Dataset
        margin_drop (prompt, group); n_heads (group); logprob_drop (prompt, group, label).
        `group` names heads, as "17.0+18.6", in the order in which groups were given. The
        attribute `forwards` says how many plain forwards of a prompt the sweep costs, and
        `separate_forwards` how many it stands for.

    Raises
    ------
    InputError
        If a group is empty or given twice, a head is out of range, or what `head_effects`
        raises.
    """
    checked = _checked(groups, model)
    arrays = _group_arrays(
        model, prompts, checked, positions, logprobs, memory_budget, batch_size, progress, change
    )
    arrays["n_heads"] = np.array([len(group) for group in checked])
    found = dataset(
        "group_effects",
        arrays,
        model,
        prompts,
        coordinates={"group": [name_of(group) for group in checked]},
        **change_settings(positions, **change),
    )
    return found.assign_attrs(_cost(model, prompts, checked, positions))


def _checked(groups: Iterable[Sequence[Head]], model: Model) -> list[Group]:
    if isinstance(groups, str) or not isinstance(groups, Iterable):
        raise InputError(f"groups={groups!r} must be a list of groups of (layer, head)")
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
    """A group's name, such as "17.0+18.6"."""
    return "+".join(f"{layer}.{head}" for layer, head in group)


def _group_arrays(
    model: Model,
    prompts: Prompts,
    groups: list[Group],
    positions: Positions,
    logprobs: bool,
    memory_budget: int | str | None,
    batch_size: int | None,
    progress: bool | str,
    change: dict[str, Any],
) -> Arrays:
    """A sweep's arrays (prompt, group, ...), and which prompts are finite."""
    for name in change:
        if name not in CHANGE:
            raise InputError(f"{name}= is not known; what heads change to is {', '.join(CHANGE)}")
    order = sorted(range(len(groups)), key=groups.__getitem__)
    (arrays,) = sweep(
        model,
        prompts,
        positions,
        logprobs=logprobs,
        memory_budget=memory_budget,
        groups=[groups[i] for i in order],
        batch_size=batch_size,
        progress=progress,
        **change,
    )
    back = np.argsort(order)
    return {name: x if name == FINITE else x[:, back] for name, x in arrays.items()}


def _cost(
    model: Model, prompts: Prompts, groups: Sequence[Group], positions: Positions
) -> dict[str, float]:
    """Attributes that say what a sweep costs, and what it stands for."""
    return {
        "forwards": round(forwards(model, prompts, groups, positions), 2),
        "separate_forwards": len(groups) + 1,
    }


def forwards(
    model: Model, prompts: Prompts, groups: Sequence[Group], positions: Positions
) -> float:
    """Plain forwards of a mean prompt that a sweep costs, the clean one included.

    Counts positions times blocks; attention, the unembedding, and what prompts share are
    left out.
    """
    at = position_mask(prompts, positions)
    real = prompts.token_id >= 0
    changed = (np.logical_or.accumulate(at, axis=1) & real).sum(axis=1).clip(min=1)
    blocks = plan(groups, model.n_layers).row_layers
    return 1 + float((changed / prompts.lengths).mean()) * blocks / model.n_layers


@measure
def pair_effects(
    model: Model,
    prompts: Prompts,
    positions: Positions = "last",
    *,
    memory_budget: int | str | None = None,
    batch_size: int | None = None,
    progress: bool | str = False,
    **change: Any,
) -> xr.Dataset:
    """Effect of changing every pair of heads of the model together, exactly.

    Parameters
    ----------
    model, prompts
        What is measured.
    positions, memory_budget, batch_size, progress, **change
        As in `group_effects`.

    Returns
    -------
    xarray.Dataset
        margin_drop (prompt, layer, head, other_layer, other_head), the same either way
        round; a head's pair with itself has its own effect. What two heads do together
        beyond what each does alone is the pair's drop less the two heads' own.
    """
    singles: list[Group] = [(head,) for head in model.heads]
    groups = singles + [tuple(pair) for pair in combinations(model.heads, 2)]
    arrays = _group_arrays(
        model, prompts, groups, positions, False, memory_budget, batch_size, progress, change
    )
    n_layers, n_heads = model.n_layers, model.n_heads
    size = n_layers * n_heads
    ends = np.array([[group[0], group[-1]] for group in groups])
    first, second = (ends[..., 0] * n_heads + ends[..., 1]).T
    drops = arrays["margin_drop"]
    table = np.zeros((len(prompts), size, size), dtype=drops.dtype)
    table[:, first, second] = drops
    table[:, second, first] = drops
    drops = table.reshape(len(prompts), n_layers, n_heads, n_layers, n_heads)
    found = dataset(
        "pair_effects",
        {"margin_drop": drops, FINITE: arrays[FINITE]},
        model,
        prompts,
        coordinates={"other_layer": np.arange(n_layers), "other_head": np.arange(n_heads)},
        **change_settings(positions, **change),
    )
    return found.assign_attrs(_cost(model, prompts, groups, positions))


@measure
def subset_effects(
    model: Model,
    prompts: Prompts,
    pool: Sequence[Head],
    positions: Positions = "last",
    **settings: Any,
) -> xr.Dataset:
    """Effect of changing every subset of a pool of heads, exactly.

    Parameters
    ----------
    model, prompts
        What is measured.
    pool
        At most 12 heads; they have 4,095 subsets.
    positions, **settings
        As in `group_effects`.

    Returns
    -------
    xarray.Dataset
        As from `group_effects`, smaller subsets first.

    Raises
    ------
    InputError
        If the pool is empty or too large.
    """
    heads = check_heads(pool, model)
    if not 1 <= len(heads) <= LARGEST_POOL:
        raise InputError(
            f"a pool of {len(heads)} heads has {2 ** len(heads) - 1} subsets; give 1 to "
            f"{LARGEST_POOL} heads, or choose greedily (greedy_heads)"
        )
    subsets = chain.from_iterable(combinations(heads, k + 1) for k in range(len(heads)))
    return group_effects(model, prompts, subsets, positions, **settings)


def strongest_group(effects: xr.Dataset, k: int) -> list[Head]:
    """The group of k heads whose change costs most of the margin, by the mean over prompts.

    Parameters
    ----------
    effects
        What `group_effects` or `subset_effects` returned.
    k
        Number of heads.

    Returns
    -------
    list of Head

    Raises
    ------
    InputError
        If no group has k heads, no effect is finite, or these are no effects of groups.
    """
    from ..head import Head

    whole("k", k, 1)
    dims = getattr(getattr(effects, "margin_drop", None), "dims", ())
    if not {"prompt", "group"} <= set(dims) or "n_heads" not in effects:
        raise InputError("strongest_group needs what group_effects or subset_effects returns")
    mean = measured_prompts(effects)["margin_drop"].mean("prompt")
    mean = mean.isel(group=np.flatnonzero(effects["n_heads"].values == k))
    if not mean.size:
        raise InputError(f"no group has {k} heads")
    name = str(mean["group"].values[_largest(mean.values)])
    return [Head(*map(int, part.split("."))) for part in name.split("+")]


def _largest(means: np.ndarray) -> int:
    """Index of the largest mean; NaN is none.

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


@measure
def greedy_heads(
    model: Model,
    prompts: Prompts,
    k: int,
    *,
    pool: Sequence[Head] | None = None,
    positions: Positions = "last",
    memory_budget: int | str | None = None,
    batch_size: int | None = None,
    progress: bool | str = False,
    **change: Any,
) -> xr.Dataset:
    """Heads chosen one after the other, each to cost most together with those before it.

    Every step sweeps all heads of the pool exactly, with those chosen so far changed as
    well; it costs about as much as `head_effects`.

    Parameters
    ----------
    model, prompts
        What is measured.
    k
        Number of heads.
    pool
        Heads to choose from; by default all.
    positions, memory_budget, batch_size, progress, **change
        As in `group_effects`.

    Returns
    -------
    xarray.Dataset
        chosen_layer, chosen_head (step); margin_drop (prompt, step), with the heads of
        all steps so far changed. The attribute `forwards` says how many plain forwards of
        a prompt it cost, and `separate_forwards` how many one by one would have taken.

    Raises
    ------
    InputError
        If k is not from 1 to the number of heads in the pool, or no effect is finite.
    """
    heads = list(model.heads) if pool is None else check_heads(pool, model)
    whole("k", k, 1, len(heads))
    chosen: list[Head] = []
    drops, cost, separate, broken = [], 0.0, 0, 0
    finite = np.ones(len(prompts), dtype=bool)
    for step in range(k):
        left = [head for head in heads if head not in chosen]
        title = f"head {step + 1} of {k}" if progress else False
        groups: list[Group] = [tuple(sorted([*chosen, head])) for head in left]
        found = _group_arrays(
            model, prompts, groups, positions, False, memory_budget, batch_size, title, change
        )
        values, finite = found["margin_drop"], found[FINITE]
        best = _largest(mean_known(values))
        chosen.append(left[best])
        drops.append(values[:, best])
        broken += int(np.isnan(values[finite]).sum())
        spent = _cost(model, prompts, groups, positions)
        cost += spent["forwards"]
        separate += int(spent["separate_forwards"])
    tell_values("greedy", broken)
    arrays = {
        "chosen_layer": np.array([head.layer for head in chosen]),
        "chosen_head": np.array([head.head for head in chosen]),
        "margin_drop": np.stack(drops, axis=1),
        FINITE: finite,
    }
    greedy = dataset(
        "greedy",
        arrays,
        model,
        prompts,
        coordinates={"step": np.arange(k)},
        **change_settings(positions, **change),
    )
    return greedy.assign_attrs(
        forwards=round(cost, 2), separate_forwards=separate, not_finite_values=broken
    )
