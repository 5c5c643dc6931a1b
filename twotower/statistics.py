"""Bootstrap intervals over prompts, and tests against chance."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from .errors import InputError


class Estimate(NamedTuple):
    """An estimate from n prompts with its bootstrap interval.

    Parameters
    ----------
    value, low, high
        Estimate, and the ends of its 95% interval.
    n
        Number of prompts.
    """

    value: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        return f"{self.value:.2f} [{self.low:.2f}, {self.high:.2f}]"

    @property
    def positive(self) -> bool:
        """Whether the whole interval lies above 0."""
        return self.low > 0

    @property
    def negative(self) -> bool:
        """Whether the whole interval lies below 0."""
        return self.high < 0


def mean_known(values: np.ndarray, axis: int = 0) -> np.ndarray:
    """Return the mean over an axis, ignoring NaN; NaN without a warning if all values are NaN.

    Parameters
    ----------
    values
        Values; NaN where missing.
    axis
        Axis of the prompts.
    """
    values = np.asarray(values)
    known = ~np.isnan(values)
    count = known.sum(axis=axis)
    total = np.where(known, values, 0).sum(axis=axis, dtype=float)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def bootstrap_mean(values: np.ndarray, seed: int = 0, resamples: int = 2000) -> Estimate:
    """Return the mean with a 95% percentile bootstrap interval over the first axis.

    Parameters
    ----------
    values
        (prompt,) values. NaN marks a missing prompt, which is left out and not counted in n.
    seed
        Seed of the resampling.
    resamples
        Number of bootstrap samples.

    Raises
    ------
    InputError
        If the values have further dims; their mean would count each value as a prompt.
    """
    values = _by_prompt(values)
    values = values[~np.isnan(values)]
    return bootstrap(lambda rows: values[rows].mean(axis=-1), len(values), seed, resamples)


def _by_prompt(values: np.ndarray) -> np.ndarray:
    found = np.asarray(values, dtype=float)
    if found.ndim != 1:
        raise InputError(
            f"values of shape {found.shape} must be by prompt; average other dims first"
        )
    return found


def bootstrap(
    statistic: Callable[[np.ndarray], np.ndarray], n: int, seed: int = 0, resamples: int = 2000
) -> Estimate:
    """Return a statistic of prompts with a 95% percentile bootstrap interval.

    Parameters
    ----------
    statistic
        Function from prompt indices (..., n), drawn with replacement, to values (...,).
    n
        Number of prompts.
    seed, resamples
        As in `bootstrap_mean`.
    """
    from scipy.stats import bootstrap as resample

    rows = np.arange(n)
    if not n:
        return Estimate(float("nan"), float("nan"), float("nan"), 0)
    if n < 2:  # too few to resample
        return Estimate(float(statistic(rows)), float("nan"), float("nan"), n)
    found = resample(
        (rows,),
        lambda drawn, axis=-1: statistic(drawn),
        n_resamples=resamples,
        method="percentile",
        vectorized=True,
        rng=np.random.default_rng(seed),
    )
    interval = found.confidence_interval
    return Estimate(float(statistic(rows)), float(interval.low), float(interval.high), n)


def reduction(
    before: np.ndarray, after: np.ndarray, seed: int = 0, resamples: int = 2000
) -> Estimate | None:
    """Return by which share a mean falls: 1 - after / before, from paired measurements.

    Parameters
    ----------
    before, after
        (n,) paired measurements, resampled in pairs. Pairs with a NaN are left out.
    seed, resamples
        As in `bootstrap_mean`.

    Returns
    -------
    Estimate or None
        None if the interval of the mean of `before` includes 0.
    """
    before, after = _by_prompt(before), _by_prompt(after)
    both = ~(np.isnan(before) | np.isnan(after))
    before, after = before[both], after[both]
    first = bootstrap_mean(before, seed)
    if not (first.positive or first.negative):
        return None
    n = len(before)
    drawn = np.random.default_rng(seed).integers(n, size=(resamples, n))
    # A resample with mean 0 before gives an infinite or undefined (0 / 0) share.
    with np.errstate(divide="ignore", invalid="ignore"):
        shares = 1 - after[drawn].mean(axis=1) / before[drawn].mean(axis=1)
    low, high = np.nanquantile(shares, (0.025, 0.975), method="nearest")
    return Estimate(float(1 - after.mean() / before.mean()), float(low), float(high), n)


def random_bound(values: np.ndarray, k: int, seed: int = 0, resamples: int = 2000) -> float:
    """Return the 95th percentile of the mean of k values drawn without replacement.

    Parameters
    ----------
    values
        The values to draw from, of any shape. A mean leaves out NaN.
    k
        Values per draw.
    seed, resamples
        Random seed, and the number of draws.
    """
    rng, values = np.random.default_rng([seed, 13]), np.ravel(values)
    drawn = np.array([rng.permutation(values.size)[:k] for _ in range(resamples)])
    return float(np.quantile(np.nanmean(values[drawn], axis=1), 0.95))


def above_chance(correct: np.ndarray, chance: float) -> float:
    """Return the p-value of an exact one-sided binomial test of accuracy against chance.

    Parameters
    ----------
    correct
        (prompt,) booleans or numbers; NaN is left out.
    chance
        Probability of a correct guess.
    """
    from scipy.stats import binomtest

    correct = np.asarray(correct, dtype=float)
    correct = correct[~np.isnan(correct)]
    if not len(correct):
        return 1.0
    test = binomtest(int(correct.sum()), len(correct), chance, alternative="greater")
    return float(test.pvalue)
