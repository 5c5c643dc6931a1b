"""How well estimated effects of heads agree with exact ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..errors import InputError
from .heads import in_context_heads

if TYPE_CHECKING:
    import xarray as xr

    from ..head import Head


@dataclass(frozen=True)
class Agreement:
    """Agreement of two rankings of heads.

    Attributes
    ----------
    rank_correlation
        Spearman's, between the heads' mean effects.
    rank_correlation_by_prompt
        Mean over prompts of Spearman's between a prompt's effects.
    missed
        False negatives: heads among the k strongest by the exact effects and not by the
        others.
    found
        Share of the k strongest that both have in common.
    """

    rank_correlation: float
    rank_correlation_by_prompt: float
    missed: list[Head]
    found: float


def agreement(exact: xr.Dataset, other: xr.Dataset, k: int = 12) -> Agreement:
    """How well other effects agree with exact ones, on the same prompts.

    Parameters
    ----------
    exact, other
        Effects of the same heads and prompts, such as `head_effects` and
        `attribution_patching` return, in this order.
    k
        Number of strongest heads that are compared.

    Returns
    -------
    Agreement
        Rank correlations, and the strongest heads that both have or that one misses.

    Raises
    ------
    InputError
        If the two are of other heads or prompts, or are no effects.
    """
    from scipy.stats import spearmanr

    for effects in (exact, other):
        dims = getattr(getattr(effects, "margin_drop", None), "dims", ())
        if not {"prompt", "layer", "head"} <= set(dims):
            raise InputError("agreement needs what head_effects or attribution_patching returns")
    a, b = exact["margin_drop"], other["margin_drop"]
    if a.sizes != b.sizes or exact.attrs.get("prompts_hash") != other.attrs.get("prompts_hash"):
        raise InputError("the effects are of other heads or of other prompts")
    strongest, others = in_context_heads(exact, k), in_context_heads(other, k)
    by_prompt = [
        spearmanr(x.values.ravel(), y.values.ravel()).statistic for x, y in zip(a, b, strict=True)
    ]
    means = (x.mean("prompt").values.ravel() for x in (a, b))
    return Agreement(
        float(spearmanr(*means).statistic),
        float(sum(by_prompt) / len(by_prompt)),
        [head for head in strongest if head not in others],
        len(set(strongest) & set(others)) / k,
    )
