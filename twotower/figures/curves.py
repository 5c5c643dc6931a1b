"""Figures of edits: accuracy against heads knocked out, biases before and after."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from ..checks import one_of
from ..errors import InputError
from ..measures.bias import BIASES
from ..results import measured_prompts
from ..statistics import bootstrap_mean
from .style import COLOURS, GREY, drawn, line, whole_numbers
from .texts import printable

if TYPE_CHECKING:
    import xarray as xr
    from matplotlib.axes import Axes

ACCURACIES = {
    "correct": "accuracy between the labels",
    "top1_correct": "accuracy over the vocabulary",
}


@drawn(4.6, 3.4)
def knocked_out(
    curves: Mapping[str, Mapping[int, xr.Dataset]], *, measure: str = "correct", ax: Axes
) -> None:
    """Plot accuracy against the number of heads knocked out.

    Parameters
    ----------
    curves
        By name of the choice of heads: results of `predict`, by number of heads.
    measure
        "correct" (between the labels) or "top1_correct" (over the vocabulary).
    ax
        Axes to draw on; by default of a new figure. Bands are 95% bootstrap intervals over
        prompts.

    Returns
    -------
    matplotlib.axes.Axes

    Raises
    ------
    InputError
            If there is no curve, or its datasets are not predictions.

    Examples
    --------
    ::

        knocked_out({"in-context heads": {
            k: tt.predict(model, test, tt.KnockOut(heads[:k], "all") if k else [])
            for k in (0, 4, 12)
        }})
    """
    one_of("measure", measure, ACCURACIES)
    _require(curves)
    labels = 0
    for number, (name, curve) in enumerate(curves.items()):
        found = []
        for k in sorted(curve):
            if not hasattr(curve[k], "data_vars") or measure not in curve[k]:
                raise InputError(f"curve {name!r} at {k} heads is not what predict returns")
            found.append(bootstrap_mean(measured_prompts(curve[k])[measure].values))
            labels = max(labels, curve[k].sizes.get("label", 0))
        line(ax, sorted(curve), found, number % len(COLOURS), printable(name))
    if labels and measure == "correct":
        ax.axhline(1 / labels, color=GREY, lw=0.8, ls=":", label="chance")
    ax.set(xlabel="heads knocked out", ylabel=ACCURACIES[measure], ylim=(-0.03, 1.03))
    whole_numbers(ax.xaxis)
    ax.legend()


@drawn(4.6, 3.4)
def bias_curves(
    curves: Mapping[str, Mapping[float, xr.Dataset]],
    *,
    kind: str = "logit_bias",
    xlabel: str = "demonstrations, majority per minority",
    ax: Axes,
) -> None:
    """Plot a bias against a condition such as imbalance, for example before and after an edit.

    Parameters
    ----------
    curves
        By name ("before", "after"): results of `label_bias`, by the condition's value.
    kind
        "logit_bias" or "count_bias".
    xlabel
        Name of the condition.
    ax
        Axes to draw on; by default of a new figure. Bands are 95% bootstrap intervals over
        prompts.

    Returns
    -------
    matplotlib.axes.Axes

    Raises
    ------
    InputError
        If there is no curve, or its datasets are not biases.
    """
    one_of("kind", kind, BIASES)
    _require(curves)
    words = kind.replace("_", " ")
    for number, (name, curve) in enumerate(curves.items()):
        found = []
        for at in sorted(curve):
            if not hasattr(curve[at], "data_vars") or kind not in curve[at]:
                raise InputError(f"curve {name!r} at {at} is not what label_bias returns")
            found.append(bootstrap_mean(measured_prompts(curve[at])[kind].values))
        line(ax, sorted(curve), found, number % len(COLOURS), printable(name))
    ax.axhline(0, color=GREY, lw=0.8, ls=":")
    ax.set(xlabel=xlabel, ylabel=words)
    ax.legend()


def _require(curves: object) -> None:
    good = isinstance(curves, Mapping) and bool(curves)
    for name, curve in curves.items() if isinstance(curves, Mapping) else ():
        good = good and isinstance(name, str) and isinstance(curve, Mapping) and bool(curve)
        good = good and all(isinstance(at, (int, float)) for at in curve)
    if not good:
        raise InputError("curves must map names to datasets by number: {'name': {0: ..., 4: ...}}")
