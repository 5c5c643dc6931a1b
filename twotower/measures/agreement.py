"""Agreement of estimated effects of heads with exact ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ..errors import InputError
from ..results.forms import with_dims
from ..results.together import alike
from ..statistics import mean_known
from .choose import in_context_heads

if TYPE_CHECKING:
    import xarray as xr

    from ..head import Head


@dataclass(frozen=True)
class Agreement:
    """Agreement of two rankings of heads.

    Attributes
    ----------
    rank_correlation
        Spearman correlation of the heads' mean effects.
    rank_correlation_by_prompt
        Spearman correlation of the heads' effects in one prompt, averaged over prompts.
    missed
        False negatives: heads among the k strongest by the exact effects, but not by the
        other ones.
    found
        Share of the k strongest heads that both rankings have in common.
    """

    rank_correlation: float
    rank_correlation_by_prompt: float
    missed: list[Head]
    found: float


def agreement(exact: xr.Dataset, other: xr.Dataset, k: int = 12) -> Agreement:
    """Return how well other effects agree with exact ones, on the same prompts.

    Effects that are missing (NaN) in one dataset are ignored in both.

    Parameters
    ----------
    exact, other
        Effects of the same heads on the same prompts, such as the results of `head_effects`
        and `attribution_patching`, in this order.
    k
        Number of strongest heads to compare.

    Returns
    -------
    Agreement
        Rank correlations, the share of common strongest heads, and the heads missed.

    Raises
    ------
    InputError
        If the two differ in weights, heads or prompts, or are not effects.
    """
    dims = ("prompt", "layer", "head")
    for effects in (exact, other):
        if not set(dims) <= set(getattr(getattr(effects, "margin_drop", None), "dims", ())):
            raise InputError("agreement needs the result of head_effects or attribution_patching")
    given = {"exact": exact, "other": other}
    exact, other = alike({x: with_dims(part, x, *dims) for x, part in given.items()})
    a, b = exact["margin_drop"], other["margin_drop"]
    both = np.isfinite(a.values) & np.isfinite(b.values)
    a, b = a.where(both), b.where(both)
    strongest, others = (
        in_context_heads(effects.assign(margin_drop=x), k)
        for effects, x in ((exact, a), (other, b))
    )
    by_prompt = [_rank_correlation(x.values, y.values) for x, y in zip(a, b, strict=True)]
    means = (x.mean("prompt").values for x in (a, b))
    return Agreement(
        _rank_correlation(*means),
        float(mean_known(np.array(by_prompt))),
        [head for head in strongest if head not in others],
        len(set(strongest) & set(others)) / k,
    )


def _rank_correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Return Spearman's correlation of the pairs without NaN; NaN for fewer than two pairs."""
    from scipy.stats import spearmanr

    known = ~(np.isnan(a) | np.isnan(b))
    if known.sum() < 2:
        return float("nan")
    return float(spearmanr(a[known], b[known]).statistic)
