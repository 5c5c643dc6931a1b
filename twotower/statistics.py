"""Intervals over prompts, and comparisons with chance."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np


class Estimate(NamedTuple):
    """A number from n prompts with its bootstrap interval.

    Parameters
    ----------
    value, low, high
        The number, and the ends of its 95% interval.
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
    """Mean over an axis of what is not NaN; NaN, without a warning, where nothing is.

    Parameters
    ----------
    values
        Numbers; NaN where one is missing.
    axis
        Of the prompts, the first one by default.
    """
    values = np.asarray(values)
    known = ~np.isnan(values)
    count = known.sum(axis=axis)
    total = np.where(known, values, 0).sum(axis=axis, dtype=float)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def bootstrap_mean(values: np.ndarray, seed: int = 0, resamples: int = 2000) -> Estimate:
    """Mean with a 95% percentile bootstrap interval over the first axis.

    Parameters
    ----------
    values
        (prompt,) one number each. Prompts whose number is NaN are missing: they are left out,
        and the estimate's n does not count them.
    seed
        Seed of the resampling.
    resamples
        Number of bootstrap samples.
    """
    values = np.asarray(values, dtype=float)
    values = values[~np.isnan(values)]
    return bootstrap(lambda rows: values[rows].mean(axis=-1), len(values), seed, resamples)


def bootstrap(
    statistic: Callable[[np.ndarray], np.ndarray], n: int, seed: int = 0, resamples: int = 2000
) -> Estimate:
    """Any number computed from prompts, with a 95% percentile bootstrap interval.

    Parameters
    ----------
    statistic
        Takes numbers of prompts (..., n), drawn with replacement, and gives (...,).
    n
        Number of prompts.
    seed, resamples
        As in `bootstrap_mean`.
    """
    from scipy.stats import bootstrap as resample

    rows = np.arange(n)
    if not n:
        return Estimate(float("nan"), float("nan"), float("nan"), 0)
    if n < 2:  # nothing to resample
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
    """Share of a mean that is taken away: 1 - after / before, from paired measurements.

    Parameters
    ----------
    before, after
        (n,) measurements of the same things, which are drawn with both. Things of which one
        measurement is NaN are left out.
    seed, resamples
        As in `bootstrap_mean`.

    Returns
    -------
    Estimate or None
        None unless the interval of the mean before excludes 0.
    """
    before, after = np.asarray(before, dtype=float), np.asarray(after, dtype=float)
    both = ~(np.isnan(before) | np.isnan(after))
    before, after = before[both], after[both]
    first = bootstrap_mean(before, seed)
    if not (first.positive or first.negative):
        return None
    n = len(before)
    drawn = np.random.default_rng(seed).integers(n, size=(resamples, n))
    # A few resamples may have no bias at all: their share is infinite, or none (0 of 0).
    with np.errstate(divide="ignore", invalid="ignore"):
        shares = 1 - after[drawn].mean(axis=1) / before[drawn].mean(axis=1)
    low, high = np.nanquantile(shares, (0.025, 0.975), method="nearest")
    return Estimate(float(1 - after.mean() / before.mean()), float(low), float(high), n)


def above_chance(correct: np.ndarray, chance: float) -> float:
    """p-value of an exact binomial test that answers are right more often than by chance.

    Parameters
    ----------
    correct
        (prompt,) boolean, or numbers of which NaN are left out.
    chance
        Probability of a right guess.
    """
    from scipy.stats import binomtest

    correct = np.asarray(correct, dtype=float)
    correct = correct[~np.isnan(correct)]
    if not len(correct):
        return 1.0
    test = binomtest(int(correct.sum()), len(correct), chance, alternative="greater")
    return float(test.pvalue)
