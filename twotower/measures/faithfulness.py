"""Faithfulness: how much of the margin a few heads keep when all others are ablated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from ..checks import whole
from ..edits.changes import Change, Mean, check_change
from ..edits.edits import KnockOut
from ..errors import InputError
from ..head import check_heads
from ..statistics import mean_known
from .datasets import dataset
from .measurement import measurement
from .predict import predict

if TYPE_CHECKING:
    import xarray as xr

    from ..models import Model
    from ..prompts import Prompts


@measurement
def faithfulness(
    model: Model,
    prompts: Prompts,
    rankings: Mapping[str, Sequence[tuple[int, int]]],
    *,
    sizes: Sequence[int] = (1, 2, 4, 8, 16, 32, 64),
    to: Change | None = None,
) -> xr.Dataset:
    """Return the margin that is left when only the first heads of a ranking keep their outputs.

    All other heads are changed at all positions; MLPs and embeddings stay.

    Parameters
    ----------
    model, prompts
        Model and prompts to measure, best other ones than those on which heads were chosen.
    rankings
        Lists of heads by name, strongest first, such as `circuit_heads` of a circuit and
        `in_context_heads` of effects.
    sizes
        Numbers of heads to keep. A ranking that is shorter keeps all of its heads.
    to
        New output of the other heads; by default their mean over the prompts.

    Returns
    -------
    xarray.Dataset
        margin (prompt, ranking, size); margin_clean and margin_without (prompt): with all heads,
        and with none. kept (ranking, size): share of the mean margin between the two; area
        (ranking): mean of `kept` over the logarithm of the size.

    Raises
    ------
    InputError
        If there is no ranking, a size is not a whole number above 0, or the margin with all heads
        is not larger than that without.
    """
    if not rankings:
        raise InputError("there are no rankings of heads")
    to = Mean(prompts) if to is None else to
    check_change(to)
    counts = sorted({whole("sizes", size, 1, len(model.heads)) for size in sizes})
    if not counts:
        raise InputError("there are no sizes")
    checked = {name: check_heads(heads, model) for name, heads in rankings.items()}

    def margin(kept: Sequence[tuple[int, int]]) -> np.ndarray:
        others = [head for head in model.heads if head not in set(kept)]
        edits = [KnockOut(others, positions="all", to=to)] if others else []
        return np.asarray(predict(model, prompts, edits)["margin"].values)

    clean, without = margin(model.heads), margin([])
    span = float(mean_known(clean) - mean_known(without))
    if not span > 0:
        raise InputError("the margin with all heads is not larger than the margin without heads")
    known = {frozenset(model.heads): clean}
    rows = []
    for heads in checked.values():
        row = []
        for size in counts:
            key = frozenset(heads[:size])
            if key not in known:
                known[key] = margin(heads[:size])
            row.append(known[key])
        rows.append(row)
    margins = np.moveaxis(np.array(rows, dtype=np.float32), -1, 0)
    kept = (mean_known(margins) - mean_known(without)) / span
    logs = np.log2(counts)
    width = logs[-1] - logs[0]
    area = kept[:, 0] if not width else np.trapezoid(kept, logs, axis=1) / width
    arrays = {
        "margin": margins,
        "margin_clean": clean,
        "margin_without": without,
        "kept": kept,
        "area": area,
        "finite": np.isfinite(clean) & np.isfinite(without),
    }
    settings = {"rankings": {n: [str(h) for h in heads] for n, heads in checked.items()}}
    coordinates = {"ranking": list(checked), "size": counts}
    return dataset(
        "faithfulness",
        arrays,
        model,
        prompts,
        {**settings, **to.describe()},
        coordinates=coordinates,
    )
