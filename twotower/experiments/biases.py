"""Common parts of the experiments on biases: mirrored prompts, choice of edits, reductions.

Each query is asked once for each favoured label, with the same right answer. The mean over
these mirrored prompts is the query's share of the bias: a model's preference for a label's word
and the query's own effect cancel. Bootstraps resample queries.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import xarray as xr

from ..figures import style
from ..head import Head
from ..measures.bias import label_bias
from ..measures.choose import in_context_heads
from ..measures.predict import predict
from ..prompts import Prompts
from ..results import Variable
from ..statistics import Estimate, bootstrap_mean, reduction
from . import parts as common
from .experiment import Setting

BIASES = {"logit_bias": "logit bias", "count_bias": "count bias"}
ACCURACIES = {
    "correct": "accuracy between the labels",
    "top1_correct": "accuracy over the vocabulary",
}
"""Right answers are balanced over labels and classes, so these are also balanced accuracies."""
AS_IT_IS, CHOSEN, RANDOM = "as it is", "chosen heads", "random heads"
KINDS = tuple(common.KINDS.values())
"""Kinds of heads in which edits are tried."""
MIN_ACCURACY_KEPT = 0.05
"""Largest loss of accuracy of an edit that may be chosen."""

Mirrored = Mapping[str, Prompts]
"""Prompts by favoured label, with the same queries in the same order."""
Edits = Callable[[Prompts, str], list[Any]]
"""Function of prompts and their favoured label; returns edits."""


class Candidate(NamedTuple):
    """A candidate edit, and the kind of heads that it changes."""

    kind: str
    heads: Sequence[Head]
    make: Callable[[Sequence[Head]], Edits]


def queries(number: int) -> int:
    """Return the largest number of queries up to `number` with balanced right answers."""
    return max(4, number - number % 4)


def check_mirrored(mirrored: Mirrored, favoured: Callable[[Prompts], np.ndarray]) -> Mirrored:
    """Check that the prompts ask the same queries and favour their labels."""
    first, *others = mirrored.values()
    for label, prompts in mirrored.items():
        if set(favoured(prompts)) != {label}:
            raise ValueError(f"prompts do not favour {label!r}")
    for other in others:
        asked = [(p.text, p.gold) for p in other]
        if asked != [(p.text, p.gold) for p in first]:
            raise ValueError("mirrored prompts ask other queries")
    return mirrored


# ---- measuring -----------------------------------------------------------------------------


def answers(
    setting: Setting, mirrored: Mirrored, edits: Mapping[str, Edits], title: str
) -> dict[str, np.ndarray]:
    """Return biases and right answers, each (prompt, favoured, edit)."""
    found = []
    for number, make in enumerate(edits.values()):
        with setting.stage(f"{title}, {number + 1} of {len(edits)}"):
            predicted = {
                label: predict(setting.model, prompts, make(prompts, label))
                for label, prompts in mirrored.items()
            }
        found.append(leanings(predicted))
    return {name: np.stack([one[name] for one in found], axis=-1) for name in found[0]}


def leanings(predicted: Mapping[str, xr.Dataset]) -> dict[str, np.ndarray]:
    """Return biases and right answers (prompt, favoured) from predictions by favoured label."""
    columns: dict[str, list[np.ndarray]] = {name: [] for name in (*BIASES, *ACCURACIES)}
    for label, one in predicted.items():
        bias = label_bias(one, [label] * one.sizes["prompt"])
        for name in BIASES:
            columns[name].append(bias[name].values)
        for name in ACCURACIES:
            columns[name].append(one[name].values)
    return {name: np.stack(values, axis=1) for name, values in columns.items()}


def bias_table(
    setting: Setting, mirrored: Mirrored, found: Mapping[str, np.ndarray], dim: str, names: Any
) -> xr.Dataset:
    """Make a table of biases and right answers, (prompt, favoured, and one more dim)."""
    dims = ("prompt", "favoured", dim)
    words = {
        "logit_bias": ("float", "the favoured label's logit less the mean of the others'"),
        "count_bias": ("float", "1 where the favoured label is predicted, else 0, less chance"),
        "correct": ("bool", "the right label has the largest logit of all labels"),
        "top1_correct": ("bool", "the most likely token is the right label"),
    }
    variables = {
        name: (Variable(dims, kind, name.replace("_", " "), reference), found[name])
        for name, (kind, reference) in words.items()
    }
    prompts = next(iter(mirrored.values()))
    coordinates = {"prompt": np.arange(len(prompts)), "favoured": list(mirrored), dim: list(names)}
    return setting.table(variables, coordinates, prompts)


# ---- choosing an edit ----------------------------------------------------------------------


def _no_edit(prompts: Prompts, label: str) -> list[Any]:
    """Return no edits."""
    return []


def share_left(found: Mapping[str, np.ndarray]) -> np.ndarray:
    """Return (edit,) the remaining share of the bias, averaged over logits and counts.

    The first edit is no edit. A bias to the other side counts as much. Edits that cost too
    much accuracy have an infinite share.
    """
    shares = []
    known = np.isfinite(found["logit_bias"]).all(axis=(1, 2))  # for every favoured label
    for name in BIASES:
        mean = np.abs(found[name][known].mean(axis=(0, 1)))
        if mean[0] > 0:
            shares.append(mean / mean[0])
    accuracy = found["correct"][known].mean(axis=(0, 1))
    left = np.mean(shares, axis=0) if shares else np.ones(len(accuracy))
    return np.where(accuracy >= accuracy[0] - MIN_ACCURACY_KEPT, left, np.inf)


def mitigate(
    setting: Setting, fit: Mirrored, test: Mirrored, candidates: Mapping[str, Candidate]
) -> dict[str, xr.Dataset]:
    """Choose edits on fitting prompts; test the best of each kind, and it in random heads."""
    some = queries(setting.size.n_fit // 3)
    fit = {label: prompts[:some] for label, prompts in fit.items()}
    tried = {AS_IT_IS: _no_edit} | {name: one.make(one.heads) for name, one in candidates.items()}
    found = answers(setting, fit, tried, "choosing an edit")
    left = dict(zip(tried, share_left(found), strict=True))

    best: dict[str, str] = {}
    for name, one in candidates.items():
        if one.kind not in best or left[name] < left[best[one.kind]]:
            best[one.kind] = name
    final = {AS_IT_IS: _no_edit} | {kind: tried[name] for kind, name in best.items()}
    winner = candidates[best[min(KINDS, key=lambda kind: left[best[kind]])]]
    known = [head for kind in KINDS for head in heads_of(setting, kind, 2)]
    draws = setting.random_heads(len(winner.heads), without=known)
    final |= {f"{RANDOM} {n + 1}": winner.make(heads) for n, heads in enumerate(draws)}
    after = answers(setting, test, final, "testing edits")
    return {
        "fit": bias_table(setting, fit, found, "edit", tried),
        "choice": choice_table(setting, best, left),
        "mitigation": bias_table(setting, test, after, "edit", final),
    }


def heads_of(setting: Setting, kind: str, part: float = 1) -> list[Head]:
    """Return heads of a kind, chosen on the fitting prompts; `part` times the usual number."""
    by = "label_logit" if kind == KINDS[0] else "margin_drop"
    return in_context_heads(setting.selection, round(part * setting.size.k), by=by)


def choice_table(
    setting: Setting, best: Mapping[str, str], left: Mapping[str, float]
) -> xr.Dataset:
    """Make a table of the best edit of each kind of heads, and the bias that it leaves."""
    about = "on the fitting prompts; mean of logit and count bias; infinite if accuracy fell"
    return setting.table(
        {
            "edit_name": (
                Variable(("kind",), "str", "chosen edit", "leaves least of the bias"),
                np.array(list(best.values()), dtype=object),
            ),
            "left": (
                Variable(("kind",), "float", "share of the bias that is left", about),
                np.array([left[name] for name in best.values()]),
            ),
        },
        {"kind": list(best)},
        setting.fit,
    )


# ---- judging -------------------------------------------------------------------------------


def by_query(runs: Sequence[xr.DataTree], table: str, name: str, **where: Any) -> np.ndarray:
    """Return (query,) values of all seeds, averaged over favoured labels."""
    found = [
        run[table][name].sel(**where).astype(float).mean("favoured", skipna=False) for run in runs
    ]
    return np.concatenate([one.values for one in found])


def edited(runs: Sequence[xr.DataTree], name: str, edit: str = AS_IT_IS) -> np.ndarray:
    """Return (query,) values of all seeds with an edit.

    Parameters
    ----------
    runs
        Runs of all seeds.
    name
        A variable of the table, such as "logit_bias" or "correct".
    edit
        A name in the table; or "chosen heads" for each run's chosen edit; or "random heads"
        for the mean over draws.
    """
    found = []
    for run in runs:
        edits = [edit]
        if edit == CHOSEN:
            edits = [chosen_kind(run)]
        elif edit == RANDOM:
            edits = [
                one
                for one in common.variable(run, "mitigation", "edit").values
                if one.startswith(RANDOM)
            ]
        draws = [by_query([run], "mitigation", name, edit=one) for one in edits]
        found.append(np.mean(draws, axis=0))
    return np.concatenate(found)


def reductions(runs: Sequence[xr.DataTree], edits: Sequence[str]) -> dict[str, Any]:
    """Return biases, reductions and accuracies with each edit, for a judgement."""
    numbers: dict[str, Any] = {}
    for name, words in BIASES.items():
        before = edited(runs, name)
        numbers[f"{words}, {AS_IT_IS}"] = bootstrap_mean(before)
        for edit in edits:
            after = edited(runs, name, edit)
            numbers[f"{words}, edit in {edit}"] = bootstrap_mean(after)
            numbers[f"reduction of {words}, edit in {edit}"] = (
                reduction(before, after) or "not reported (no clear bias before the edit)"
            )
    for name, words in ACCURACIES.items():
        numbers[f"{words}, {AS_IT_IS}"] = bootstrap_mean(edited(runs, name))
        for edit in edits:
            numbers[f"{words}, edit in {edit}"] = bootstrap_mean(edited(runs, name, edit))
    for run in runs:
        kind = chosen_kind(run)
        numbers[f"chosen edit, seed {run.attrs['seed']}"] = str(
            run["choice"]["edit_name"].sel(kind=kind).item()
        )
    return numbers


def helps(runs: Sequence[xr.DataTree], name: str) -> bool:
    """Whether the chosen edit reduces a bias, and more than the same edit in random heads.

    The reduction's interval lies between 0 and 2 (above 2 the bias is larger than before, to
    the other side), and random heads leave more bias (paired interval).
    """
    found = reduction(edited(runs, name), edited(runs, name, CHOSEN))
    return found is not None and found.low > 0 and found.high < 2 and _random_leave(runs, name) > 0


def harms(runs: Sequence[xr.DataTree], name: str) -> bool:
    """Whether the chosen edit makes a bias larger, or random heads leave less bias."""
    found = reduction(edited(runs, name), edited(runs, name, CHOSEN))
    larger = found is not None and (found.high < 0 or found.low > 2)
    return larger or _random_leave(runs, name) < 0


def _random_leave(runs: Sequence[xr.DataTree], name: str) -> int:
    """Return 1 if random heads leave more than the chosen ones, -1 if less, 0 if unclear."""
    more = bootstrap_mean(edited(runs, name, RANDOM) - edited(runs, name, CHOSEN))
    return int(more.positive) - int(more.negative)


def chosen_kind(run: xr.DataTree) -> str:
    """Return the kind of heads whose best edit leaves the least bias on the fitting prompts."""
    left = run["choice"]["left"]
    return min(KINDS, key=lambda kind: float(left.sel(kind=kind)))


# ---- pictures ------------------------------------------------------------------------------


def draw_reductions(axes: Any, numbers: Mapping[str, Any], edits: Sequence[str]) -> None:
    """Draw bars of each edit's reduction of logit and count bias."""
    for place, edit in enumerate(edits):
        for side, words in enumerate(BIASES.values()):
            found = numbers[f"reduction of {words}, edit in {edit}"]
            if isinstance(found, Estimate):
                style.bar(axes, place + 0.36 * side - 0.18, found, side, words, place == 0)
    axes.axhline(0, color=style.GREY, lw=0.8)
    axes.axhline(1, color=style.GREY, lw=0.8, ls=":")
    axes.set_xticks(range(len(edits)), [edit.replace(" ", "\n", 1) for edit in edits])
    if axes.get_legend_handles_labels()[0]:  # else no reduction is reported
        axes.legend(frameon=False, fontsize=8)
