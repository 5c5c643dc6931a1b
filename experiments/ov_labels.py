"""OV carries labels: a label position's value-output vector says the label that stands there.

The paper says that in the in-context heads the value and output matrices extract the label
from label positions. So the raw value-output vector W_O v of such a position should have a
larger logit for the position's own label than for the others. It should do so more than the
vectors of other positions: the text of the demonstration, what stands between, the query. And
it should do so more in the heads that matter than in others.

Every position is asked about its own label: the label of its demonstration; of the query, the
last position and what stands before all demonstrations, the right label. Separators are told
apart by the side of the label on which they stand, since what comes after it can have read it.

Raw vectors say what a head would carry from a position; weighted by attention, and summed over
the positions of a role, they say what it does carry to the last position.

    python experiments/ov_labels.py --out runs/experiments
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
from twotower.statistics import Estimate, bootstrap_mean

RULE = """Of the heads that write the answer (largest label logit, chosen on other prompts), with
all seeds together: supported if (1) the raw value-output vectors of label positions have a larger
logit for their own label than for the others (interval above 0, and the mean of every seed);
(2) by more than those of the demonstrations' texts, and by more than label positions in heads
that neither write nor are in-context heads (intervals of both differences above 0); (3) their
mean OV AUC exceeds that of 95% of random sets of as many heads. Not supported if the interval of
(1), or of a difference in (2), lies wholly below 0; else undecided."""

ROLES = ("bos", "text", "separator before label", "label", "separator after label", "query", "last")
KINDS = {**common.KINDS, "others": "other heads"}


# ---- what is measured ---------------------------------------------------------------------


def measure(setting: Setting) -> Mapping[str, xr.Dataset]:
    """What the vectors of every role of position say, on the test prompts."""
    model, test = setting.model, setting.test
    writers, heads = setting.writers, setting.heads  # settles that the task can be done
    with setting.stage("measuring QK and OV"):
        run = tt.analyze(model, test, measures=("qk", "ov"))
    raw, roles = own_label_logit(run["ov"]), roles_of(run["ov"])
    weighted = raw * run["qk"]["attention"].values
    dims = ("prompt", "role", "layer", "head")
    by_role = setting.table(
        {
            "raw": (
                Variable(
                    dims,
                    "float",
                    "own label's logit of raw vectors",
                    "label logit of the raw value-output vector for the position's own label, less "
                    "the mean of the other labels'; mean over the role's positions",
                ),
                over_role(raw, roles),
            ),
            "weighted": (
                Variable(
                    dims,
                    "float",
                    "own label's logit of weighted vectors",
                    "the same of attention times the raw vectors; sum over the role's positions",
                ),
                over_role(weighted, roles, total=True),
            ),
        },
        {
            "prompt": np.arange(len(test)),
            "role": list(ROLES),
            "layer": np.arange(model.n_layers),
            "head": np.arange(model.n_heads),
        },
    )
    return {
        "scores": run["scores"].to_dataset(),
        "by_role": by_role,
        "tokens": _tokens(setting, list(dict.fromkeys([*writers, *heads]))),
        "heads": common.heads_table(setting, {"writers": writers, "in_context": heads}),
    }


def own_label_logit(ov: xr.DataTree | xr.Dataset) -> np.ndarray:
    """(prompt, layer, head, position) own label's logit less the mean of the others'."""
    logits, text = ov["label_logit"], ov["label_text"]
    own = logits["label"] == text.where(text != "", ov["gold"])
    right = logits.where(own).sum("label")
    others = logits.where(~own).sum("label") / (logits.sizes["label"] - 1)
    dims = ("prompt", "layer", "head", "position")
    return common.known((right - others).transpose(*dims).values, ov)


def roles_of(ov: xr.DataTree | xr.Dataset) -> np.ndarray:
    """(prompt, position) role, separators by the side of the label."""
    role, number = ov["role"].values, ov["demonstration"].values
    found = role.copy()
    for row in range(len(role)):
        passed: set[int] = set()
        for column in range(role.shape[1]):
            if role[row, column] == "label":
                passed.add(number[row, column])
            elif role[row, column] == "separator":
                side = "after" if number[row, column] in passed else "before"
                found[row, column] = f"separator {side} label"
    return np.asarray(found)


def over_role(values: np.ndarray, roles: np.ndarray, total: bool = False) -> np.ndarray:
    """(prompt, role, layer, head) mean, or sum, over a role's positions; NaN without any."""
    found = np.full((len(values), len(ROLES), *values.shape[1:3]), np.nan)
    for number, role in enumerate(ROLES):
        at = roles == role
        count = at.sum(axis=1)
        summed = np.einsum("plhx,px->plh", np.where(at[:, None, None], values, 0), at.astype(float))
        there = count > 0
        found[there, number] = summed[there] / (1 if total else count[there, None, None])
    return found


def _tokens(setting: Setting, heads: list[tt.Head]) -> xr.Dataset:
    """How often the vector of a label position is nearest to the label, of all tokens."""
    test = setting.test
    with setting.stage("unembedding vectors of label positions"):
        top = tt.ov_labels(setting.model, test, keep="labels", top_tokens=heads)
    token, there = top["top_token"].values, (top["role"] == "label").values
    labels = dict(zip(test.labels, test.label_ids, strict=True))
    decode = setting.model.tokenizer.decode
    texts = top["label_text"].values.tolist()
    exact = np.array([[decode([labels[x]]) if x else "" for x in row] for row in texts])
    share = {}
    for name, form in (("token", str), ("word", lambda x: x.strip().lower())):
        same = np.vectorize(form)(token) == np.vectorize(form)(exact)[:, None]
        said = (same & there[:, None]).sum(axis=-1) / there.sum(axis=-1)[:, None]
        share[name] = common.known(said, top)
    return setting.table(
        {
            "own_token": (
                Variable(
                    ("prompt", "chosen"),
                    "float",
                    "label positions whose top token is their label",
                    "share of label positions whose raw value-output vector has the largest "
                    "logit, of the whole vocabulary, for the label that stands there",
                ),
                share["token"],
            ),
            "own_word": (
                Variable(
                    ("prompt", "chosen"),
                    "float",
                    "label positions whose top token spells their label",
                    "the same, blanks and capitals aside",
                ),
                share["word"],
            ),
        },
        {"prompt": np.arange(len(test)), "chosen": [str(head) for head in heads]},
    )


# ---- the verdict --------------------------------------------------------------------------


def judge(runs: list[xr.DataTree]) -> Judgement:
    """By the rule above."""
    numbers: dict[str, Any] = {}
    for kind, words in KINDS.items():
        for name, how in (("raw", "raw vectors"), ("weighted", "weighted vectors")):
            for role in ROLES:
                values = of_role(runs, name, role, kind)
                if len(values):
                    numbers[f"{how} of {role} positions, {words}"] = bootstrap_mean(values)
    for kind, words in common.KINDS.items():
        numbers[f"OV AUC, {words}"] = common.mean_score(runs, "ov_auc", kind)
        for name in ("own_token", "own_word"):
            about = runs[0]["tokens"][name].attrs["long_name"]
            numbers[f"{about}, {words}"] = bootstrap_mean(of_tokens(runs, name, kind))
    strongest = common.chosen(runs[0], "writers")[0]
    numbers["strongest head that writes, seed 0"] = str(strongest)
    numbers["label positions whose top token spells their label, that head, seed 0"] = (
        bootstrap_mean(runs[0]["tokens"]["own_word"].sel(chosen=str(strongest)).values)
    )
    numbers["OV AUC, all heads"] = common.mean_score(runs, "ov_auc", None)
    bound = common.mean_random_bound(runs, "ov_auc", "writers")
    numbers["OV AUC, 95% of random sets below"] = bound

    label = of_role(runs, "raw", "label", "writers")
    said = bootstrap_mean(label)
    than_text = bootstrap_mean(label - of_role(runs, "raw", "text", "writers"))
    than_others = bootstrap_mean(label - of_role(runs, "raw", "label", "others"))
    numbers["label positions less texts, heads that write"] = than_text
    numbers["heads that write less other heads, label positions"] = than_others
    by_seed = [of_role([run], "raw", "label", "writers").mean() for run in runs]
    auc = common.mean_score(runs, "ov_auc", "writers")
    verdict = "undecided"
    steps = (said, than_text, than_others)
    if all(one.positive for one in steps) and min(by_seed) > 0 and auc > bound:
        verdict = "supported"
    elif any(one.negative for one in steps):
        verdict = "not supported"
    reason = (
        f"In the heads that write, raw vectors of label positions favour their own label by {said} "
        f"logits, {than_text} more than those of texts and {than_others} more than in other "
        f"heads; OV AUC {auc:.2f} (random sets up to {bound:.2f})."
    )
    return Judgement(verdict, reason, numbers)


def of_role(runs: list[xr.DataTree], name: str, role: str, kind: str) -> np.ndarray:
    """(prompt,) mean over a kind's heads, prompts of all seeds, where the role stands."""
    found = []
    for run in runs:
        values = run["by_role"][name].sel(role=role).transpose("layer", "head", "prompt").values
        mask = np.zeros(values.shape[:2], dtype=bool)
        for one in common.KINDS if kind == "others" else (kind,):
            mask[tuple(np.transpose(common.chosen(run, one)))] = True
        mean = values[~mask if kind == "others" else mask].mean(axis=0)
        found.append(mean[np.isfinite(mean)])
    return np.concatenate(found)


def of_tokens(runs: list[xr.DataTree], name: str, kind: str) -> np.ndarray:
    """(prompt,) mean over a kind's heads, prompts of all seeds."""
    return np.concatenate(
        [
            run["tokens"][name]
            .sel(chosen=[str(head) for head in common.chosen(run, kind)])
            .mean("chosen")
            .values
            for run in runs
        ]
    )


# ---- the picture --------------------------------------------------------------------------


def draw(runs: list[xr.DataTree], judgement: Judgement) -> Any:
    """Own label's logit by role, raw and weighted; top tokens of single heads."""
    plt = common.pyplot()
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(11, 4), layout="constrained")
    numbers = judgement.numbers
    for axes, how, title in (
        (left, "raw vectors", "Raw value-output vectors"),
        (middle, "weighted vectors", "Weighted by attention, summed"),
    ):
        shown = [role for role in ROLES if f"{how} of {role} positions, other heads" in numbers]
        for side, words in enumerate(KINDS.values()):
            for place, role in enumerate(shown):
                estimate = numbers[f"{how} of {role} positions, {words}"]
                assert isinstance(estimate, Estimate)
                x = place + 0.26 * (side - 1)
                style.bar(axes, x, estimate, side, words, place == 0, width=0.26)
        names = [role.replace("separator ", "separator\n") for role in shown]
        axes.set_xticks(range(len(shown)), names, rotation=35, ha="right", fontsize=8)
        axes.axhline(0, color=style.GREY, lw=0.8)
        axes.set(title=title, ylabel="own label less the others (logits)")
    left.legend(frameon=False, fontsize=8)
    heads = common.chosen(runs[0], "writers")
    for place, head in enumerate(heads):
        values = runs[0]["tokens"]["own_word"].sel(chosen=str(head)).values
        style.bar(right, place, bootstrap_mean(values), 0, "", False, width=0.6)
    right.set_xticks(range(len(heads)), [str(head) for head in heads], rotation=60, fontsize=8)
    right.set(
        title="Top token is the position's own label",
        xlabel="heads that write, strongest first (seed 0)",
        ylabel="share of label positions",
        ylim=(0, 1.05),
    )
    return figure


EXPERIMENT = Experiment(
    number=2,
    name="ov-labels",
    title="OV carries labels",
    claim="In the heads that write the answer, the value-output vector of a label position "
    "favours the label that stands there, more than at other positions and in other heads.",
    headline="In the in-context heads the value-output vectors of label positions carry the "
    "label (shown by logit minus and top tokens).",
    rule=RULE,
    measure=measure,
    judge=judge,
    draw=draw,
)

if __name__ == "__main__":
    from twotower.cli import main

    main(["experiments", "run", __file__, *sys.argv[1:]])
