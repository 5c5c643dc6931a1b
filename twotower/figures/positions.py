"""Figures of one head on one prompt: its attention, and its label logits by position."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from ..checks import yes_or_no
from ..errors import InputError
from ..head import as_head
from ..prompts.segments import ROLES
from .style import BLUE, COLOURS, GREEN, GREY, ORANGE, drawn
from .texts import printable
from .views import PromptView, prompt_view

if TYPE_CHECKING:
    import xarray as xr
    from matplotlib.axes import Axes

    from ..head import Head

SAME, OTHER = "label, the query's class", "label, another class"
KINDS = {SAME: ORANGE, "label": ORANGE, OTHER: BLUE, "query": GREEN, "bos": COLOURS[3]}
"""Kinds of positions and their colours, the same in all figures; the user's spans take others."""

MOST_TICKS = 100
"""Maximum number of tokens on an axis; longer prompts show only those of named positions."""


@drawn(7.0, 2.8)
def attention(run: xr.DataTree, head: Head | Sequence[int], prompt: int = 0, *, ax: Axes) -> None:
    """Plot a head's attention from the last position to a prompt's tokens, coloured by role.

    Parameters
    ----------
    run
        Result of `analyze` or `open`, with `qk`.
    head
        Layer and head.
    prompt
        Number of the prompt.
    ax
        Axes to draw on; by default of a new figure.

    Returns
    -------
    matplotlib.axes.Axes

    Raises
    ------
    InputError
        If the run lacks the head, the prompt or the attention.
    """
    view = prompt_view(run, prompt)
    values = _values(view, head, "attention")
    x = np.arange(len(view.tokens))
    kinds = np.array(_kinds(view), dtype=object)
    for kind, shade in _shades(kinds).items():
        here = kinds == kind
        ax.bar(x[here], values[here], 0.9, color=shade, label=printable(kind))
    _name_positions(ax, view)
    ax.set(ylabel="attention", title=_title(view, head))
    ax.legend(ncols=3)


@drawn(7.0, 2.8)
def label_logits(
    run: xr.DataTree,
    head: Head | Sequence[int],
    prompt: int = 0,
    *,
    weighted: bool = False,
    ax: Axes,
) -> None:
    """Plot the label logits of a head's value-output vectors, position by position.

    Parameters
    ----------
    run
        Result of `analyze` or `open`, with `ov`.
    head, prompt, ax
        As in `attention`.
    weighted
        Multiply by the attention of the last position (needs `qk`).

    Returns
    -------
    matplotlib.axes.Axes

    Raises
    ------
    InputError
        If the run lacks the head, the prompt or the values.
    """
    yes_or_no("weighted", weighted)
    view = prompt_view(run, prompt)
    values = _values(view, head, "label_logit")
    if weighted:
        values = values * _values(view, head, "attention")[:, None]
    x = np.arange(len(view.tokens))
    markers = "osD^vPX"  # 7 markers and 6 colours: 42 labels are distinguishable
    for number, label in enumerate(view.labels):
        colour = COLOURS[number % len(COLOURS)]
        ax.plot(x, values[:, number], "-", lw=0.6, color=colour, alpha=0.5)
        if view.answers:
            own, words = view.named, f"{label}, {view.answers[label]!r}"
        else:
            own = view.named[view.label_texts[view.named] == label]
            words = f"{label}, where it stands"
        mark = markers[number % len(markers)]
        ax.plot(own, values[own, number], mark, ms=5, color=colour, label=printable(words))
        other = np.setdiff1d(view.named, own)
        ax.plot(other, values[other, number], mark, ms=4, mfc="none", mec=colour, lw=0)
    ax.axhline(0, color=GREY, lw=0.8)
    _name_positions(ax, view)
    hollow = "" if view.answers else "; hollow where another label stands"
    ax.set(
        ylabel="label logit, weighted" if weighted else "label logit",
        title=f"{_title(view, head)}{hollow}",
    )
    ax.legend(ncols=3)


def _title(view: PromptView, head: Head | Sequence[int]) -> str:
    return f"Head {as_head(head)}, prompt {view.number} ({printable(view.right)} is right)"


def _values(view: PromptView, head: Head | Sequence[int], name: str) -> np.ndarray:
    found = view.of(head)
    if name not in found:
        raise InputError(f"the run holds no {name.replace('_', ' ')}s by position")
    return found[name]


def _kinds(view: PromptView) -> list[str]:
    """Return the kind of each position: one of `KINDS`, a span's name, or "other"."""
    found = []
    for role, cls in zip(view.roles, view.classes, strict=True):
        if role == "label" and view.query_class:
            found.append(SAME if cls == view.query_class else OTHER)
        else:
            found.append(str(role) if role in KINDS or role not in ROLES else "other")
    return found


def _shades(kinds: np.ndarray) -> dict[str, str]:
    """Return the colours of kinds of positions, "other" last."""
    present = dict.fromkeys(kinds)
    shades = {kind: shade for kind, shade in KINDS.items() if kind in present}
    spans = [kind for kind in present if kind not in KINDS and kind != "other"]
    free = [shade for shade in COLOURS if shade not in shades.values()] or COLOURS
    shades |= {kind: free[i % len(free)] for i, kind in enumerate(spans)}
    return shades | ({"other": GREY} if "other" in present else {})


def _name_positions(ax: Axes, view: PromptView) -> None:
    """Write tokens below the axis; for long prompts only those of named positions."""
    n = len(view.tokens)
    at = np.arange(n) if n <= MOST_TICKS else view.named
    names = [printable(view.tokens[i]) for i in at]
    ax.set_xticks(at, names, rotation=90, fontsize=6)
    ax.set_xlim(-1, n)
    for name, here in zip(ax.get_xticklabels(), at, strict=True):
        if here in view.named:
            name.set_fontweight("bold")
