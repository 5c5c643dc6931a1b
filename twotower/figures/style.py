"""Style of all figures: colours for colour-blind readers, sizes for print."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import InputError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.typing import RcKeyType

    from ..statistics import Estimate

BLUE, ORANGE, GREY, GREEN = "#0072B2", "#D55E00", "#8a8a8a", "#009E73"
COLOURS = (BLUE, ORANGE, GREEN, "#CC79A7", "#E69F00", "#56B4E9")
"""Colours distinguishable without colour vision (Okabe & Ito 2008)."""

LOOK: dict[RcKeyType, Any] = {
    "font.size": 9,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
}
"""matplotlib's settings."""


def drawn(
    width: float = 5.0, height: float = 3.5
) -> Callable[[Callable[..., None]], Callable[..., Axes]]:
    """Make a decorator that gives a plot function its Axes and the common style.

    Parameters
    ----------
    width, height
        Size in inches of a new figure, if no Axes are given.
    """

    def decorate(function: Callable[..., None]) -> Callable[..., Axes]:
        @wraps(function)
        def draw(*arguments: Any, ax: Axes | None = None, **options: Any) -> Axes:
            from matplotlib import axes
            from matplotlib import pyplot as plt

            figure = None
            if ax is not None and not isinstance(ax, axes.Axes):
                raise InputError(f"ax={ax!r} must be matplotlib Axes, or left out")
            if ax is None:  # outside the style, which would reset a notebook's settings
                figure = plt.figure(figsize=(width, height), layout="constrained")
            with plt.rc_context(LOOK):
                place = ax if figure is None else figure.subplots()
                assert place is not None  # either ax or figure is given
                try:
                    function(*arguments, ax=place, **options)
                except BaseException:
                    if figure is not None:  # leave no empty figure behind
                        plt.close(figure)
                    raise
            return place

        return draw

    return decorate


def whole_numbers(axis: Axis) -> None:
    """Put ticks of an axis only at whole numbers."""
    # Any, because the typed base class of locators lacks the setting.
    locator: Any = axis.get_major_locator()
    locator.set_params(integer=True)


def bar(
    ax: Axes,
    x: float,
    estimate: Estimate,
    colour: int,
    label: str,
    named: bool,
    width: float = 0.34,
) -> None:
    """Draw a bar with its interval; `named` bars get a legend entry."""
    words = label if named else None
    ax.bar(x, estimate.value, width, color=COLOURS[colour], label=words)
    if np.isfinite(estimate.low):
        # Around its own middle: the interval of a ratio need not hold the ratio.
        middle, half = (estimate.low + estimate.high) / 2, (estimate.high - estimate.low) / 2
        ax.errorbar(x, middle, half, fmt="none", ecolor="black", lw=1, capsize=2)


def line(
    ax: Axes, x: Sequence[float], estimates: Sequence[Estimate], colour: int, label: str
) -> None:
    """Draw a line of estimates with their intervals as a band."""
    ax.plot(x, [e.value for e in estimates], "o-", ms=4, color=COLOURS[colour], label=label)
    ax.fill_between(
        x,
        [e.low for e in estimates],
        [e.high for e in estimates],
        color=COLOURS[colour],
        alpha=0.18,
        lw=0,
    )
