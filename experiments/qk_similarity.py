"""QK is a similarity: heads look at demonstrations that are like the query.

The paper says that in the in-context heads query and key matrices are the two towers of a
retriever. Two things follow that can be seen from outside.

First, the score of a label position is larger where the demonstration has the query's own
class: the QK AUC, the probability that it is, is above one half. The content part of the
score, without rotary's distances, should show it as well.

Second, the paper's contrast. Reverse the labels of the demonstrations and ask again. If QK
measures similarity to the demonstration's *text*, attention stays with the demonstrations
of the query's class, and so moves away from the label that was right before. If OV reads the
*label*, the raw value-output vector of a position now says the new label: foo positions say
foo in both prompts.

    python experiments/qk_similarity.py --out runs/experiments
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import numpy as np
import xarray as xr

import twotower as tt
from twotower.experiments import parts as common
from twotower.experiments.experiment import Experiment, Judgement, Setting
from twotower.figures import style
from twotower.results import Variable
from twotower.statistics import bootstrap_mean, mean_known

RULE = """Of the heads that write the answer (largest label logit, chosen on other prompts):
supported if, with all seeds together, (1) their mean QK AUC exceeds that of 95% of random sets
of as many heads, and exceeds 0.5 in every seed; (2) the attention that the right label's positions
lose when the labels are reversed is positive, interval and every seed; (3) the raw value-output
vectors say the position's own label, more often than not, before and after (intervals). Not
supported if the interval of (2), or one of (3), lies wholly on the other side; else undecided."""


# ---- what is measured ---------------------------------------------------------------------


def measure(setting: Setting) -> Mapping[str, xr.Dataset]:
    """QK and OV of the test prompts and of their twins with the labels reversed."""
    model, test = setting.model, setting.test
    writers, heads = setting.writers, setting.heads  # settles that the task can be done
    twin = test.reversed_labels()
    with setting.stage("measuring QK and OV, labels as given and reversed"):
        runs = [
            tt.analyze(model, prompts, measures=("qk", "ov"), keep="labels")
            for prompts in (test, twin)
        ]
    contrast = setting.table(
        {
            "attention": (
                Variable(
                    ("prompt", "layer", "head", "twin"),
                    "float",
                    "attention to the right label",
                    "attention of the last position to label positions holding the label that is "
                    "right in the prompt as it was, less that to the others",
                ),
                np.stack([_attention_margin(run["qk"], test.gold) for run in runs], axis=-1),
            ),
            "own_label": (
                Variable(
                    ("prompt", "layer", "head", "twin"),
                    "float",
                    "label positions that say their own label",
                    "share of label positions whose raw value-output vector has a larger label "
                    "logit for the label that stands there than for any other",
                ),
                np.stack([_own_label(run["ov"]) for run in runs], axis=-1),
            ),
        },
        {
            "prompt": np.arange(len(test)),
            "layer": np.arange(model.n_layers),
            "head": np.arange(model.n_heads),
            "twin": ["as it was", "labels reversed"],
        },
    )
    chosen = common.heads_table(setting, {"writers": writers, "in_context": heads})
    return {"scores": runs[0]["scores"].to_dataset(), "contrast": contrast, "heads": chosen}


def _attention_margin(qk: xr.DataTree, gold: np.ndarray) -> np.ndarray:
    """(prompt, layer, head) attention to positions holding `gold`, less that to the others."""
    right = qk["label_text"] == xr.DataArray(gold, dims="prompt")
    attention = qk["attention"].where(qk["role"] == "label")
    margin = attention.where(right).sum("position") - attention.where(~right).sum("position")
    return common.known(margin.values, qk)


def _own_label(ov: xr.DataTree) -> np.ndarray:
    """(prompt, layer, head) share of label positions whose raw vector says its own label."""
    logits = ov["label_logit"]
    own = logits["label"] == ov["label_text"]
    says = logits.where(own).max("label") > logits.where(~own).max("label")
    return common.known(says.where(ov["role"] == "label").mean("position").values, ov)


# ---- the verdict --------------------------------------------------------------------------


def judge(runs: list[xr.DataTree]) -> Judgement:
    """By the rule above."""
    numbers: dict[str, Any] = {}
    for kind, words in common.KINDS.items():
        moved = np.concatenate([_of_heads(run, "attention", kind) for run in runs])
        own = np.concatenate([_of_heads(run, "own_label", kind) for run in runs])
        numbers[f"QK AUC, {words}"] = common.mean_score(runs, "qk_auc", kind)
        numbers[f"QK AUC of the content part, {words}"] = common.mean_score(
            runs, "qk_auc_content", kind
        )
        numbers[f"attention lost by the right label, {words}"] = bootstrap_mean(
            moved[:, 0] - moved[:, 1]
        )
        for number, when in enumerate(("as it was", "labels reversed")):
            numbers[f"raw vectors that say their own label, {when}, {words}"] = bootstrap_mean(
                own[:, number]
            )
    numbers["QK AUC, all heads"] = common.mean_score(runs, "qk_auc", None)
    bound = common.mean_random_bound(runs, "qk_auc", "writers")
    numbers["QK AUC, 95% of random sets below"] = bound

    words = common.KINDS["writers"]
    auc, lost = numbers[f"QK AUC, {words}"], numbers[f"attention lost by the right label, {words}"]
    said = [
        numbers[f"raw vectors that say their own label, {when}, {words}"]
        for when in ("as it was", "labels reversed")
    ]
    by_seed = [common.mean_score([run], "qk_auc", "writers") for run in runs]
    lost_by_seed = [
        float(mean_known(np.subtract(*_of_heads(run, "attention", "writers").T))) for run in runs
    ]
    similar = auc > bound and min(by_seed) > 0.5
    stays = all(one.low > 0.5 for one in said)
    verdict = "undecided"
    if similar and lost.positive and min(lost_by_seed) > 0 and stays:
        verdict = "supported"
    elif lost.negative or any(one.high < 0.5 for one in said):
        verdict = "not supported"
    reason = (
        f"QK AUC {auc:.2f} (random sets up to {bound:.2f}); reversed, the right label's positions "
        f"lose {lost} of attention, and raw vectors say their own label {said[0]} and {said[1]}."
    )
    return Judgement(verdict, reason, numbers)


def _of_heads(run: xr.DataTree, name: str, kind: str) -> np.ndarray:
    """(prompt, twin) mean over the chosen heads."""
    values = run["contrast"][name].transpose("layer", "head", "prompt", "twin").values
    return np.mean([values[head] for head in common.chosen(run, kind)], axis=0)


# ---- the picture --------------------------------------------------------------------------


def draw(runs: list[xr.DataTree], judgement: Judgement) -> Any:
    """QK AUC of every head; attention and raw vectors before and after the reversal."""
    plt = common.pyplot()
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(11, 3.8), layout="constrained")
    auc = np.mean([run["scores"]["qk_auc"].values for run in runs], axis=0)
    image = left.imshow(auc.T, cmap="PuOr_r", vmin=0, vmax=1, aspect="auto")
    for head in common.chosen(runs[0], "writers"):
        left.plot(*head, "s", mfc="none", mec="black", ms=8, mew=1.1)
    left.set(xlabel="layer", ylabel="head", title="QK AUC (squares: write the answer, seed 0)")
    left.set_yticks(range(auc.shape[1]))
    figure.colorbar(image, ax=left, shrink=0.85)
    for axes, name, title in (
        (middle, "attention", "Attention to the label that was right"),
        (right, "own_label", "Raw vectors that say their own label"),
    ):
        for number, kind in enumerate(common.KINDS):
            values = np.concatenate([_of_heads(run, name, kind) for run in runs])
            for side, when in enumerate(("as it was", "labels reversed")):
                estimate = bootstrap_mean(values[:, side])
                style.bar(axes, number + 0.36 * side - 0.18, estimate, side, when, number == 0)
        axes.set(title=title)
        axes.set_xticks(range(len(common.KINDS)), list(common.KINDS.values()))
        axes.axhline(0 if name == "attention" else 0.5, color=style.GREY, lw=0.8, ls=":")
        axes.legend(frameon=False, fontsize=8)
    middle.set_ylabel("attention, less that to the other label")
    return figure


EXPERIMENT = Experiment(
    number=3,
    name="qk-similarity",
    title="QK is a similarity",
    claim="Heads that write the answer look at demonstrations of the query's class; reversing "
    "the labels moves attention between labels and leaves what a label position says.",
    headline="Attention moves when labels are reversed; the raw value-output vectors stay foo "
    "at foo and bar at bar (shown for examples).",
    rule=RULE,
    measure=measure,
    judge=judge,
    draw=draw,
)

if __name__ == "__main__":
    from twotower.cli import main

    main(["experiments", "run", __file__, *sys.argv[1:]])
