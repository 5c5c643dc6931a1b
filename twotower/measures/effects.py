"""Head effects: what each head's knock-out costs, exactly, for all heads."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from ..errors import InputError
from .ablation import make_replacement
from .batch import Batch
from .collect import collect, dataset
from .edits import position_mask
from .readout import get_readout
from .sweep import Sweep

if TYPE_CHECKING:
    import xarray as xr

    from ..models import Model
    from ..prompts import Prompts


def head_effects(
    model: Model,
    prompts: Prompts,
    positions: str | np.ndarray = "last",
    *,
    ablation: str = "zero",
    reference: Prompts | None = None,
    seed: int = 0,
    logprobs: bool = True,
    batch_size: int | None = None,
    progress: bool | str = False,
) -> xr.Dataset:
    """Effect of knocking out every head, one at a time.

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
    ablation, reference, seed
        What it is replaced by: "zero"; or "mean" or "resample" from reference prompts (see
        `KnockOut`).
    logprobs
        Whether to give drops of log-probabilities, which needs the whole vocabulary for
        every head. Without them only the labels' logits are computed.
    batch_size
        Prompts in a batch; by default as many as make about a thousand tokens.
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
        If positions, ablation and reference do not fit, or prompts cannot be aligned.
    """
    make = sweep_maker(model, prompts, positions, ablation, reference, seed, logprobs)
    (arrays,) = collect(model, prompts, [make], batch_size=batch_size, progress=progress)
    return dataset(
        "effects",
        arrays,
        model,
        prompts,
        positions=positions if isinstance(positions, str) else "given",
        ablation=ablation,
        ablation_seed=seed,
        reference=None if reference is None else reference.hash,
    )


def sweep_maker(
    model: Model,
    prompts: Prompts,
    positions: str | np.ndarray = "last",
    ablation: str = "zero",
    reference: Prompts | None = None,
    seed: int = 0,
    logprobs: bool = True,
) -> Callable[[Batch], Sweep]:
    """What makes a sweep's recorder for each batch."""
    at = position_mask(prompts, positions)
    if not at.any():
        raise InputError("positions are empty: nothing would be knocked out")
    replacement = make_replacement(model, prompts, at, ablation, reference, seed)
    readout = get_readout(model, prompts.label_ids)

    def make(batch: Batch) -> Sweep:
        values = replacement.values(batch, range(model.n_layers))
        return Sweep(batch, readout, batch.cut(at), values, logprobs)

    return make
