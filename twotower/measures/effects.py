"""Head effects: what each head's knock-out costs, exactly, for all heads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from ..checks import check_measured, yes_or_no
from ..intervention import named
from .batch import Batch
from .collect import Arrays, MakeRecorder, collect, dataset
from .counterfactuals import Group
from .edits import prepare_change
from .layout import make_layout
from .memory import what_fits
from .missing import tells_once
from .readout import get_readout
from .rows import Change
from .sweep import Sweep

if TYPE_CHECKING:
    import xarray as xr

    from ..intervention import Positions
    from ..models import Model
    from ..prompts import Prompts


@tells_once
def head_effects(
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
    batch_size: int | None = None,
    progress: bool | str = False,
) -> xr.Dataset:
    """Effect of changing every head, one at a time.

    Every number equals that of a separate forward with the head's output replaced, but
    all heads are swept in one walk over the layers (see `twotower.measures.rows`): at the
    last position for about the cost of one more forward.

    Parameters
    ----------
    model, prompts
        What is measured.
    positions
        Where a head's output is replaced: "last", "labels", "all", or a boolean (prompt,
        position) array. "labels" cuts what heads write at label positions, not what the
        last position reads from them.
    ablation, reference, seed, factor
        What it is replaced by: "zero"; "mean" or "resample" from reference prompts (see
        `KnockOut`); "patch": the head's output in the reference prompt of the same number,
        role by role (activation patching); "scale": itself times `factor`.
    logprobs
        Whether to give drops of log-probabilities, which needs the whole vocabulary for
        every head. Without them only the labels' logits are computed.
    memory_budget
        Bytes, or a text such as "2GiB", that a batch may take beyond the weights; by
        default half of what is free. Rows go through the layers in chunks that fit.
    batch_size
        Prompts in a batch; fewer where memory runs out. By default about a thousand
        tokens' worth on a processor, and as many as fill a GPU, which is found out and
        remembered.
    progress
        Show a bar; a text is its title.

    Returns
    -------
    xarray.Dataset
        margin_drop (prompt, layer, head): clean minus knocked out, positive where the head
        helps. logprob_drop (prompt, layer, head, label), in nat.

    Raises
    ------
    InputError
        If positions, ablation and reference do not fit, prompts cannot be aligned, or not
        one row fits the memory budget; the message says how much is needed.
    """
    check_measured(model, prompts)
    (arrays,) = sweep(
        model,
        prompts,
        positions,
        ablation=ablation,
        reference=reference,
        seed=seed,
        factor=factor,
        logprobs=logprobs,
        memory_budget=memory_budget,
        batch_size=batch_size,
        progress=progress,
    )
    return dataset(
        "effects",
        arrays,
        model,
        prompts,
        **change_settings(positions, ablation, reference, seed, factor),
    )


def change_settings(
    positions: Positions,
    ablation: str = "zero",
    reference: Prompts | None = None,
    seed: int = 0,
    factor: float = 0.0,
) -> dict[str, Any]:
    """What heads' outputs were changed to, for the record."""
    return {
        "positions": named(positions),
        "ablation": ablation,
        "ablation_seed": seed,
        "factor": factor,
        "reference": None if reference is None else reference.hash,
    }


def sweep(
    model: Model,
    prompts: Prompts,
    positions: Positions,
    *,
    beside: Sequence[MakeRecorder] = (),
    batch_size: int | None = None,
    progress: bool | str = False,
    **options: Any,
) -> list[Arrays]:
    """A sweep over all prompts, and what further recorders take beside it.

    Prompts that begin alike come into one batch where that saves something: rows of the
    last position alone have no beginning in common.

    Parameters
    ----------
    model, prompts, positions, batch_size, progress
        As in `head_effects`.
    beside
        What makes further recorders.
    **options
        As `sweep_maker` takes them.
    """
    make = sweep_maker(model, prompts, positions, **options)
    where = positions if isinstance(positions, str) else "given"
    n_groups = len(options.get("groups") or ()).bit_length()
    told = tuple(repr(options.get(name)) for name in ("ablation", "logprobs", "memory_budget"))
    return collect(
        model,
        prompts,
        [make, *beside],
        batch_size=batch_size,
        shared=where != "last",
        kind=("sweep", where, n_groups, len(beside), *told),
        progress=progress,
    )


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
    """
    yes_or_no("logprobs", logprobs)
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
        where = model.layer_devices
        return Sweep(batch, readout, layout, change, chunks, unembedded, shape, where, name)

    return make
