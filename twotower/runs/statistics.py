"""Intervals over prompts."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Estimate(NamedTuple):
    """A mean over n prompts with its bootstrap interval.

    Parameters
    ----------
    value, low, high
        Mean, and the ends of the 95% interval.
    n
        Number of prompts.
    """

    value: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        return f"{self.value:.2f} [{self.low:.2f}, {self.high:.2f}]"


def bootstrap_mean(values: np.ndarray, seed: int = 0, resamples: int = 2000) -> Estimate:
    """Mean with a 95% percentile bootstrap interval over the first axis.

    Parameters
    ----------
    values
        (prompt,) one number each.
    seed
        Seed of the resampling.
    resamples
        Number of bootstrap samples.
    """
    from scipy.stats import bootstrap

    values = np.asarray(values, dtype=float)
    found = bootstrap(
        (values,),
        np.mean,
        n_resamples=resamples,
        method="percentile",
        rng=np.random.default_rng(seed),
    )
    interval = found.confidence_interval
    return Estimate(float(values.mean()), float(interval.low), float(interval.high), len(values))
