"""QK alone, OV alone: which of the two towers moves the answer, and when.

Attention and values can be patched apart. Take, at the last position of the chosen heads, the
attention of a changed prompt on the prompt's own values (QK alone), the values of the changed
prompt under the prompt's own attention (OV alone), or both. How much of the way does the answer
go, from the prompt's own margin to the changed prompt's margin on that same label?

The hypothesis says that attention follows similarity of the query and the demonstrations' texts,
and that values carry labels. So it predicts opposite things of two changes of the prompt.

*Labels reversed*: the same texts with the labels changed over. No similarity changes, so that
attention, position by position, should hardly move; the labels do, so that values should
explain most of the way and attention little.

*Query replaced*: the same demonstrations, asked about a text of another class. Label positions
come before the query, so that their values are the very same; similarities change. Attention
should explain the way and values little. They need not explain nothing: the query's own
positions have values, too. A patch of attention needs a position for every position, so only
queries with as many tokens are taken.

    python experiments/qk_ov_alone.py --out runs/experiments
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import numpy as np
import xarray as xr

import twotower as tt
from twotower.errors import FindingError
from twotower.experiments import parts as common
from twotower.experiments.experiment import Experiment, Judgement, Setting
from twotower.figures import style
from twotower.results import Variable
from twotower.statistics import Estimate, bootstrap, bootstrap_mean

RULE = """The prediction: with the labels reversed, values explain more of the shift of the margin
than attention does; with the query replaced, attention explains more than values do. Of the heads
that write the answer (largest label logit, chosen on other prompts), with all seeds together:
supported if both differences of the share explained have the predicted sign (interval, and every
seed), and both patches together explain, in either change, more than in twice as many random
heads (interval of the difference above 0). Not supported if the interval of one of the two
differences lies wholly on the other side; else undecided."""

CONTRASTS = {"labels": "labels reversed", "query": "query replaced"}
WHATS = {"attention": "attention alone", "values": "values alone", "both": "both"}
SETS = {
    "writers": "heads that write",
    "writers_twice": "twice as many heads that write",
    "in_context": "in-context heads",
    "in_context_twice": "twice as many in-context heads",
    "random": "twice as many random heads",
}
N_DRAWS = 10
"""Draws of other queries among which those of equal length are looked for."""


# ---- what is measured ---------------------------------------------------------------------


def measure(setting: Setting) -> Mapping[str, xr.Dataset]:
    """Margins of some test prompts, as they are, changed, and with heads patched."""
    test, n = setting.test, setting.size.n_task
    sets = head_sets(setting)
    first = test[: min(n, len(test))]
    pairs = {"labels": [(first, first.reversed_labels())], "query": asked_otherwise(test, n)}
    found = {name: _contrast(setting, name, parts, sets) for name, parts in pairs.items()}
    return {**found, "heads": common.heads_table(setting, sets)}


def head_sets(setting: Setting) -> dict[str, list[tt.Head]]:
    """The heads that are patched, by name."""
    k = setting.size.k
    writers = tt.in_context_heads(setting.selection, 2 * k, by="label_logit")
    heads = tt.in_context_heads(setting.selection, 2 * k)
    random = setting.random_heads(2 * k, without=[*writers, *heads])[0]
    return {
        "writers": writers[:k],
        "writers_twice": writers,
        "in_context": heads[:k],
        "in_context_twice": heads,
        "random": random,
    }


def asked_otherwise(prompts: tt.Prompts, n: int) -> list[tuple[tt.Prompts, tt.Prompts]]:
    """Up to n prompts, and the same asked about another class in as many tokens, in parts.

    Raises
    ------
    FindingError
        If no prompt has a query of equal length to be replaced by.
    """
    parts = []
    left = np.ones(len(prompts), dtype=bool)
    for draw in range(N_DRAWS):
        others = prompts.other_queries(draw)
        rows = np.flatnonzero(left & (others.lengths == prompts.lengths))[:n]
        if len(rows):
            parts.append((prompts[rows], others[rows]))
            left[rows] = False
            n -= len(rows)
    if not parts:
        raise FindingError("no two queries of different classes have equally many tokens")
    return parts


def _contrast(
    setting: Setting,
    name: str,
    parts: list[tuple[tt.Prompts, tt.Prompts]],
    sets: Mapping[str, list[tt.Head]],
) -> xr.Dataset:
    """Margins towards the label that is right in the prompt as it was."""
    found = [_patched(setting, name, *part, sets) for part in parts]
    arrays = {key: np.concatenate([one[key] for one in found]) for key in found[0]}
    towards = "towards the label that is right in the prompt as it was"
    variables = {
        "margin_clean": Variable(
            ("prompt",), "float", "margin of the prompt as it was", f"margin {towards}"
        ),
        "margin_changed": Variable(
            ("prompt",), "float", "margin of the changed prompt", f"margin {towards}"
        ),
        "margin_patched": Variable(
            ("prompt", "set", "what"),
            "float",
            "margin with heads patched",
            f"margin {towards}, the heads having, at the last position, the changed prompt's "
            "attention, values, or both",
        ),
        "moved": Variable(
            ("prompt", "set"),
            "float",
            "attention that moves",
            "half the sum over positions of the absolute difference of the last position's "
            "attention in the two prompts, mean over the heads",
        ),
    }
    return setting.table(
        {key: (variables[key], arrays[key]) for key in variables},
        {"prompt": np.arange(len(arrays["margin_clean"])), "set": list(sets), "what": list(WHATS)},
        contrast=name,
    )


def _patched(
    setting: Setting,
    name: str,
    prompts: tt.Prompts,
    changed: tt.Prompts,
    sets: Mapping[str, list[tt.Head]],
) -> dict[str, np.ndarray]:
    model = setting.model
    words = CONTRASTS[name]
    with setting.stage(f"{words}: both prompts"):
        own, other = (
            tt.analyze(model, each, measures=("predictions", "qk")) for each in (prompts, changed)
        )
    clean = own["predictions"]["margin"].values
    difference = own["qk"]["attention"].values - other["qk"]["attention"].values
    moved = common.known(np.nansum(np.abs(difference), axis=-1) / 2, own["qk"], other["qk"])
    # Attention and values together are all that a head's output is made of.
    with setting.stage(f"{words}: both patched"):
        drop = tt.group_effects(
            model, prompts, list(sets.values()), to=tt.From(changed), logprobs=False
        )["margin_drop"].values
    with setting.stage(f"{words}: attention and values by themselves"):
        margins = [
            [
                tt.predict(model, prompts, tt.Patch(heads, changed, what))["margin"].values
                for key, heads in sets.items()
            ]
            for what in ("attention", "values")
        ]
    alone = np.array(margins).transpose(2, 1, 0)  # (prompt, set, what)
    both = clean[:, None, None] - drop[..., None]
    of_set = [moved[:, *np.transpose(heads)].mean(axis=-1) for heads in sets.values()]
    return {
        "margin_clean": clean,
        "margin_changed": margin_of(other["predictions"]["logit"].values, prompts.gold_index),
        "margin_patched": np.concatenate((alone, both), axis=-1),
        "moved": np.stack(of_set, axis=-1),
    }


def margin_of(logits: np.ndarray, gold: np.ndarray) -> np.ndarray:
    """(prompt,) the gold label's logit less the largest of the others'."""
    right = np.arange(logits.shape[1]) == gold[:, None]
    return np.asarray(logits[right] - np.where(right, -np.inf, logits).max(axis=1))


# ---- the verdict --------------------------------------------------------------------------


def judge(runs: list[xr.DataTree]) -> Judgement:
    """By the rule above."""
    numbers: dict[str, Any] = {}
    for contrast, about in CONTRASTS.items():
        for name, which in (("margin_clean", "as it was"), ("margin_changed", "changed")):
            values = np.concatenate([run[contrast][name].values for run in runs])
            numbers[f"{about}: margin of the prompt {which}"] = bootstrap_mean(values)
        for key, heads in SETS.items():
            for what, words in WHATS.items():
                numbers[f"{about}: share explained by {words}, {heads}"] = share(
                    runs, contrast, {(key, what): 1.0}
                )
            moved = np.concatenate([run[contrast]["moved"].sel(set=key).values for run in runs])
            numbers[f"{about}: attention that moves, {heads}"] = bootstrap_mean(moved)
    differences, together, signs = {}, {}, []
    for contrast, more, less in (
        ("labels", "values", "attention"),
        ("query", "attention", "values"),
    ):
        about, weights = CONTRASTS[contrast], {("writers", more): 1.0, ("writers", less): -1.0}
        differences[contrast] = share(runs, contrast, weights)
        signs += [share([run], contrast, weights).value for run in runs]
        together[contrast] = share(
            runs, contrast, {("writers", "both"): 1.0, ("random", "both"): -1.0}
        )
        heads = SETS["writers"]
        numbers[f"{about}: share of {more} less that of {less}, {heads}"] = differences[contrast]
        numbers[f"{about}: both, {heads} less random heads"] = together[contrast]
    verdict = "undecided"
    if all(one.positive for one in (*differences.values(), *together.values())) and min(signs) > 0:
        verdict = "supported"
    elif any(one.negative for one in differences.values()):
        verdict = "not supported"
    said = {
        (contrast, what): numbers[
            f"{CONTRASTS[contrast]}: share explained by {WHATS[what]}, {SETS['writers']}"
        ]
        for contrast in CONTRASTS
        for what in WHATS
    }
    reason = "; ".join(
        f"{about}: values alone explain {said[contrast, 'values']} of the shift, attention alone "
        f"{said[contrast, 'attention']}, both {said[contrast, 'both']}"
        for contrast, about in CONTRASTS.items()
    )
    return Judgement(verdict, f"In the heads that write, {reason}.", numbers)


def share(
    runs: list[xr.DataTree], contrast: str, weights: Mapping[tuple[str, str], float]
) -> Estimate:
    """Weighted sum of shares explained: mean shift by a patch over mean shift by the change."""
    patched, shift = [], []
    for run in runs:
        table = run[contrast]
        clean = table["margin_clean"].values
        shift.append(clean - table["margin_changed"].values)
        patched.append(
            sum(
                weight * (clean - table["margin_patched"].sel(set=key, what=what).values)
                for (key, what), weight in weights.items()
            )
        )
    top, bottom = np.concatenate(patched), np.concatenate(shift)
    known = np.isfinite(top) & np.isfinite(bottom)
    top, bottom = top[known], bottom[known]
    return bootstrap(lambda rows: top[rows].mean(axis=-1) / bottom[rows].mean(axis=-1), len(bottom))


# ---- the picture --------------------------------------------------------------------------


def draw(runs: list[xr.DataTree], judgement: Judgement) -> Any:
    """Shares explained in both changes, by set of heads; attention that moves."""
    plt = common.pyplot()
    figure, (left, middle, right) = plt.subplots(
        1, 3, figsize=(11, 4), layout="constrained", width_ratios=(1, 1, 0.8)
    )
    k = len(common.chosen(runs[0], "writers"))
    names = [f"{k} writing", f"{2 * k} writing", f"{k} in-context", f"{2 * k} in-context"]
    names.append(f"{2 * k} random")
    for axes, (contrast, about) in zip((left, middle), CONTRASTS.items(), strict=True):
        for place, heads in enumerate(SETS.values()):
            for side, words in enumerate(WHATS.values()):
                estimate = judgement.numbers[f"{about}: share explained by {words}, {heads}"]
                x = place + 0.26 * (side - 1)
                style.bar(axes, x, estimate, side, words, place == 0, width=0.26)
        n = sum(run[contrast].sizes["prompt"] for run in runs)
        axes.axhline(0, color=style.GREY, lw=0.8)
        axes.set_xticks(range(len(SETS)), names, rotation=35, ha="right", fontsize=8)
        axes.set(title=f"{about.capitalize()} ({n} prompts)", ylabel="share of the shift explained")
    low = min(left.get_ylim()[0], middle.get_ylim()[0])
    high = max(left.get_ylim()[1], middle.get_ylim()[1])
    for axes in (left, middle):
        axes.set_ylim(low, high)
    left.legend(frameon=False, fontsize=8)
    for place, heads in enumerate(SETS.values()):
        for side, about in enumerate(CONTRASTS.values()):
            estimate = judgement.numbers[f"{about}: attention that moves, {heads}"]
            style.bar(right, place + 0.36 * side - 0.18, estimate, side + 3, about, place == 0)
    right.set_xticks(range(len(SETS)), names, rotation=35, ha="right", fontsize=8)
    right.set(title="Attention that moves", ylabel="share of the last position's attention")
    right.set_ylim(0, 1.2 * right.get_ylim()[1])  # room for the legend
    right.legend(frameon=False, fontsize=8)
    return figure


EXPERIMENT = Experiment(
    number=7,
    name="qk-ov-alone",
    title="QK alone, OV alone",
    claim="With labels reversed the answer follows the values of the heads that write, with the "
    "query replaced it follows their attention.",
    headline="Separate interventions on query-key and value-output matrices are named as a "
    "further check; no figure of the paper's is known here.",
    rule=RULE,
    measure=measure,
    judge=judge,
    draw=draw,
)

if __name__ == "__main__":
    from twotower.cli import main

    main(["experiments", "run", __file__, *sys.argv[1:]])
