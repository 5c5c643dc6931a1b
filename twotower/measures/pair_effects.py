"""Pair effects: the exact drop of the margin when two heads are changed, for all pairs."""

from __future__ import annotations

from itertools import combinations
from typing import TYPE_CHECKING

import numpy as np

from ..edits.changes import Change, Zero
from ..sweep.counterfactuals import Group
from ..walk.not_finite import FINITE
from .datasets import dataset
from .group_effects import GroupEffects, group_arrays, sweep_cost
from .measurement import measurement

if TYPE_CHECKING:
    import xarray as xr

    from ..models import Model
    from ..prompts import Prompts
    from ..prompts.positions import Positions


@measurement
def pair_effects(
    model: Model,
    prompts: Prompts,
    positions: Positions = "last",
    *,
    to: Change = Zero(),
) -> xr.Dataset:
    """Return the exact effect of changing two heads together, for all pairs of the model.

    Parameters
    ----------
    model, prompts
        Model and prompts to measure.
    positions, to
        As in `head_effects`.

    Returns
    -------
    xarray.Dataset
        margin_drop (prompt, layer, head, other_layer, other_head), symmetric; the diagonal
        holds the effects of single heads. The interaction of two heads is the pair's drop minus
        the drops of the two single heads.

    Raises
    ------
    InputError
        As `head_effects`.
    """
    singles: list[Group] = [(head,) for head in model.heads]
    groups = singles + [tuple(pair) for pair in combinations(model.heads, 2)]
    measure = GroupEffects(tuple(groups), positions, to, logprobs=False)
    arrays = group_arrays(measure, model, prompts)
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
        measure.settings(),
        coordinates={"other_layer": np.arange(n_layers), "other_head": np.arange(n_heads)},
    )
    return found.assign_attrs(sweep_cost(model, prompts, groups, positions))
