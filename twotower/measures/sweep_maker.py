"""Making a sweep ready: what is changed, in which groups, in chunks that fit the memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from ..checks import yes_or_no
from ..models.rounding import Rounding
from ..options import option
from .batch import Batch
from .counterfactuals import Group
from .edits import prepare_change
from .judge import refuse
from .layout import make_layout
from .memory import what_fits
from .readout import get_readout
from .rows import Change
from .sweep import Sweep

if TYPE_CHECKING:
    from ..intervention import Positions
    from ..models import Model
    from ..prompts import Prompts


def sweep_maker(
    model: Model,
    prompts: Prompts,
    positions: Positions = "last",
    *,
    ablation: str = "zero",
    reference: Prompts | None = None,
    seed: int = 0,
    factor: float = 0.0,
    logprobs: bool = True,
    memory_budget: int | str | None = None,
    groups: Sequence[Group] | None = None,
    gold: np.ndarray | None = None,
) -> Callable[[Batch], Sweep]:
    """What makes a sweep's recorder for each batch.

    Without `groups` every head is one, and results are by layer and head. Groups cost
    least in sorted order, in which those that share lower heads stand together. `gold`
    (prompt,) is the number of the label whose margin is read, by default the right one.

    Raises
    ------
    CheckError
        If something is in force that rows cannot follow.
    """
    yes_or_no("logprobs", logprobs)
    if option("proof") and model.state is not None:
        refuse(model, model.state.unfollowed())
    at, replacement = prepare_change(model, prompts, positions, ablation, reference, seed, factor)
    readout = get_readout(model, prompts.label_ids)
    name = "group_effects"
    shape: tuple[int, ...] = (-1,)
    if groups is None:
        name, shape = "effects", (model.n_layers, model.n_heads)
        groups = [(head,) for head in model.heads]

    def make(batch: Batch) -> Sweep:
        layout = make_layout(
            batch.part(prompts.token_id),
            batch.part(at),
            replacement.kinds(batch),
            6 * model.d_model,
            batch.devices,
        )
        source = layout.source.own
        values = replacement.values(batch, range(model.n_layers), source)
        changed = batch.cut(at).map(lambda x: x.flatten()[source])
        change = Change(changed, factor, values)
        fit = what_fits(model, layout, batch.width, memory_budget, logprobs)
        chunks = [groups[i : i + fit.rows] for i in range(0, len(groups), fit.rows)]
        if gold is not None:
            batch = replace(batch, gold=batch.everywhere(gold[batch.rows]))
        unembedded = fit.vectors if logprobs else 0
        how = (model.layer_devices, name, Rounding.of(model) if option("proof") else None)
        return Sweep(batch, readout, layout, change, chunks, unembedded, shape, *how)

    return make
