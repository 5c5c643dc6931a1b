"""Preparation of a sweep: the change, the groups of heads, and chunks that fit the memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from ..edits.changes import Change, Zero
from ..edits.prepared import prepare_change
from ..errors import InputError
from ..models.rounding import Rounding
from ..options import option
from ..prompts.positions import position_mask
from ..prompts.sequences import Continued
from ..walk.batch import Batch
from ..walk.judge import refuse
from ..walk.readouts import Readouts
from .counterfactuals import Group
from .layout import make_layout
from .memory import what_fits
from .rows import RowChange
from .sweep import Sweep

if TYPE_CHECKING:
    from ..models import Model
    from ..prompts import Prompts
    from ..prompts.positions import Positions


def prepare_sweep(
    model: Model,
    prompts: Prompts,
    positions: Positions = "last",
    to: Change = Zero(),
    *,
    groups: Sequence[Group] | None = None,
    logprobs: bool = False,
    tokens: int = 0,
) -> Callable[[Batch], Sweep]:
    """Return a function that builds the sweep recorder for a batch.

    Parameters
    ----------
    model, prompts
        Model and prompts to measure.
    positions
        Positions at which heads' outputs are changed.
    to
        New outputs of the heads.
    groups
        Groups of heads to change together. Sorted order is cheapest, because it puts groups
        with the same lower heads next to each other. By default every head is a group, and
        results are by layer and head.
    logprobs
        Whether to return drops of log-probabilities too.
    tokens
        If not 0, return values of this many tokens of completions (see `Sweep`).

    Raises
    ------
    CheckError
        If the model has active interventions that a sweep cannot reproduce in its rows.
    InputError
        If no position would be changed, or the change does not fit the prompts.
    """
    if option("proof") and model.state is not None:
        refuse(model, model.state.unfollowed())
    at = position_mask(prompts, positions)
    if not at.any():
        raise InputError("positions are empty: nothing would be changed")
    change = prepare_change(to, model, prompts, at)
    readouts = Readouts(model, prompts)
    continued = isinstance(prompts, Continued)
    logprobs = logprobs or continued or prompts.answers.alone
    name = "group_effects"
    shape: tuple[int, ...] = (-1,)
    places = None
    if groups is None:
        name, shape = "effects", (model.n_layers, model.n_heads)
        groups = [(head,) for head in model.heads]
        if len(groups) < model.n_layers * model.n_heads:
            places = [head.layer * model.n_heads + head.head for head in model.heads]

    def make(batch: Batch) -> Sweep:
        layout = make_layout(
            batch.part(prompts.token_id),
            batch.part(at),
            change.kinds(batch),
            6 * model.d_model,
            batch.devices,
            separate=any(map(model.architecture.mixes, range(model.n_layers))),
            reads=batch.answers.reads.own.numpy(),
        )
        source = layout.source.own
        changed = batch.cut(at).map(lambda x: x.flatten()[source])
        rows = RowChange(changed, change.for_batch(batch, range(model.n_layers), source))
        fit = what_fits(model, layout, batch.width, logprobs)
        chunks = [groups[i : i + fit.rows] for i in range(0, len(groups), fit.rows)]
        unembedded = fit.vectors if logprobs else 0
        how = (places, model.layer_devices, name, Rounding.of_proof(model))
        parts = (layout, rows, chunks, unembedded, shape, *how)
        return Sweep(batch, readouts.of(batch), *parts, tokens=tokens)

    return make
