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

    from ..models import Head, Model
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


def in_context_heads(
    effects: xr.Dataset | xr.DataTree, k: int = 12, *, label: str | None = None
) -> list[Head]:
    """The heads that in-context learning needs most.

    Parameters
    ----------
    effects
        What `head_effects` returned, or a run that holds it.
    k
        Number of heads.
    label
        If given, that label's heads: those whose knock-out lowers its log-probability most
        where it is the right answer (the foo-heads and bar-heads of Yu & Ananiadou 2024).
        Otherwise heads are ranked by the mean drop of the margin.

    Returns
    -------
    list of Head
        Strongest first. The first k of a larger k.

    Raises
    ------
    InputError
        If k is out of range, or the label is not known or never right.
    """
    from ..models import Head

    if "effects" in getattr(effects, "children", {}):
        effects = effects["effects"]
    if label is None:
        mean = effects["margin_drop"].mean("prompt")
    else:
        if "logprob_drop" not in effects:
            raise InputError("a label's heads need effects with logprobs=True")
        if label not in effects["label"].values:
            known = ", ".join(map(str, effects["label"].values))
            raise InputError(f"label {label!r} is not among {known}")
        right = effects["logprob_drop"].sel(label=label).where(effects["gold"] == label, drop=True)
        if not right.sizes["prompt"]:
            raise InputError(f"label {label!r} is the right answer of no prompt")
        mean = right.mean("prompt")
    values = mean.transpose("layer", "head").values
    if isinstance(k, bool) or not 1 <= k <= values.size:
        raise InputError(f"k={k!r} must be from 1 to {values.size}, the number of heads")
    order = np.argsort(-values, axis=None, kind="stable")[:k]
    layers, heads = mean["layer"].values, mean["head"].values
    rows, columns = np.unravel_index(order, values.shape)
    return [Head(int(layers[x]), int(heads[y])) for x, y in zip(rows, columns, strict=True)]
