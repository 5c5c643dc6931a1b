"""Head effects: what each head's knock-out costs, exactly, for all heads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..intervention import named
from .collect import Arrays, MakeRecorder, collect, dataset
from .measure import measure
from .sweep_maker import sweep_maker

if TYPE_CHECKING:
    import xarray as xr

    from ..intervention import Positions
    from ..models import Model
    from ..prompts import Prompts


@measure
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
