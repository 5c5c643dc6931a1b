"""Greedy choice of heads: each lowers the margin most together with those chosen before it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from ..checks import whole
from ..edits.changes import Change, Zero
from ..head import check_heads
from ..statistics import mean_known
from ..sweep.counterfactuals import Group
from ..walk.not_finite import FINITE, note_values
from .datasets import dataset
from .group_effects import GroupEffects, group_arrays, largest, sweep_cost
from .measurement import measurement

if TYPE_CHECKING:
    import xarray as xr

    from ..head import Head
    from ..models import Model
    from ..prompts import Prompts
    from ..prompts.positions import Positions


@measurement
def greedy_heads(
    model: Model,
    prompts: Prompts,
    k: int = 12,
    *,
    pool: Sequence[tuple[int, int]] | None = None,
    positions: Positions = "last",
    to: Change = Zero(),
) -> xr.Dataset:
    """Choose heads one by one, each to lower the margin most together with those before it.

    Every step is an exact sweep over the remaining heads of the pool, in which the heads chosen
    so far are changed too. A step costs about as much as `head_effects`.

    Parameters
    ----------
    model, prompts
        Model and prompts to measure.
    k
        Number of heads.
    pool
        Heads to choose from; all by default.
    positions, to
        As in `head_effects`.

    Returns
    -------
    xarray.Dataset
        chosen_layer, chosen_head (step); margin_drop (prompt, step) with the heads of all
        steps so far changed. The attribute `forwards` is the cost in plain forwards of a
        prompt; `separate_forwards` is the number of separate forwards replaced.

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
        groups: tuple[Group, ...] = tuple(tuple(sorted([*chosen, head])) for head in left)
        measure = GroupEffects(groups, positions, to, logprobs=False)
        found = group_arrays(measure, model, prompts, title=f"head {step + 1} of {k}")
        values, finite = found["margin_drop"], found[FINITE]
        best = largest(mean_known(values))
        chosen.append(left[best])
        drops.append(values[:, best])
        broken += int(np.isnan(values[finite]).sum())
        spent = sweep_cost(model, prompts, groups, positions)
        cost += spent["forwards"]
        separate += int(spent["separate_forwards"])
    note_values("greedy", broken)
    arrays = {
        "chosen_layer": np.array([head.layer for head in chosen]),
        "chosen_head": np.array([head.head for head in chosen]),
        "margin_drop": np.stack(drops, axis=1),
        FINITE: finite,
    }
    coordinates = {"step": np.arange(k)}
    greedy = dataset("greedy", arrays, model, prompts, measure.settings(), coordinates=coordinates)
    return greedy.assign_attrs(
        forwards=round(cost, 2), separate_forwards=separate, not_finite_values=broken
    )
