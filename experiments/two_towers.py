"""Two towers as metric learning: the heads' queries and keys, used as a retriever.

If the query and key matrices of the heads that write the answer are the two towers of a
retriever, they should work as one. Embed the last position by the query tower and every label
position by the key tower, take nothing but q.k, and answer with the class of the best position:
how often is that the query's class? Scores of several heads are standardised within a prompt,
head by head, and summed. Beside it stand the model itself and the similarity that needs no
learned metric: the cosine of residual streams, of the last position and the label positions
(what the towers are given), and of the last tokens of the query's and the demonstrations' texts.
The layer, and whether streams are centred first, are chosen for the cosine on other prompts.

The paper's mechanism, in one number: label information flows in proportion to similarity. So
the attention on positions of the right label, less that on the other labels', summed over the
heads, should explain how sure the model is, its margin. Three sums are tried: of attention, of
exponentiated scores (each head's divided by their sum over the label positions), and of
weighted value-output vectors' label logits. R^2 is that of a line with one regressor, fitted
and read on the same prompts, negative where the slope is.

    python experiments/two_towers.py --out runs/experiments
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
from twotower.results import Variable, measured_prompts
from twotower.results.missing import finite_prompts
from twotower.statistics import bootstrap, bootstrap_mean, mean_known

RULE = """Of the heads that write the answer (largest label logit, chosen on other prompts), with
all seeds together: supported if (1) the nearest demonstration by their summed scores has the
query's class more often than chance (interval) and than with 95% of random sets of as many heads;
(2) it has so not less often than the nearest by cosine of the streams that the towers are given
(interval of the difference not wholly below 0); (3) the attention on the right label less that on
the others, summed over the heads, has a signed R^2 with the margin above 0 (interval) and above
that of 95% of random sets. Not supported if the interval of (1) or of (3) lies wholly below
chance or 0; else undecided."""

RULES = ("nearest", "mean")
WEIGHTS = {
    "attention": "attention",
    "kernel": "exponentiated scores",
    "weighted": "weighted value-output vectors",
}
COMPARED = {"label": ("last", "label"), "text": ("query", "text")}
N_SETS = 500


# ---- what is measured ---------------------------------------------------------------------


def measure(setting: Setting) -> Mapping[str, xr.Dataset]:
    """Scores of label positions, what they sum to, and cosines, on the test prompts."""
    model, test = setting.model, setting.test
    writers, heads = setting.writers, setting.heads  # settles that the task can be done
    with setting.stage("measuring QK and OV"):
        run = tt.analyze(model, test, measures=("predictions", "qk", "ov"), keep="labels")
    with setting.stage("residual streams"):
        fit_streams, streams = (
            tt.measures.residual.residual_streams(model, prompts, keep=ends(prompts))
            for prompts in (setting.fit, test)
        )
    return {
        "towers": _towers(setting, run),
        "cosine": _cosines(setting, test, streams, fit_streams),
        "cosine_fit": _cosines(setting, setting.fit, fit_streams, fit_streams),
        "heads": common.heads_table(setting, {"writers": writers, "in_context": heads}),
    }


def _towers(setting: Setting, run: xr.DataTree) -> xr.Dataset:
    qk = run["qk"]
    # Prompts that are not finite are zeros on the way, and NaN in the end.
    finite = xr.DataArray(finite_prompts(qk), dims="prompt")
    score, attention = (qk[x].where(finite, 0).values for x in ("score", "attention"))
    at = np.asarray(qk["role"] == "label")
    classes, asked = class_numbers(qk["demonstration_class"].values, qk["query_class"].values)
    own = np.asarray(qk["label_text"] == qk["gold"])
    kernel = np.exp(score - np.nanmax(score, axis=-1, keepdims=True))
    kernel /= np.nansum(kernel, axis=-1, keepdims=True)
    logits = run["ov"]["label_logit"].where(finite, 0)
    gold = (logits["label"] == logits["gold"]).transpose("prompt", "label").values
    n_others = logits.sizes["label"] - 1
    says = np.where(gold[:, None, None, None], logits.values, -logits.values / n_others)
    gaps = [
        label_gap(attention, own, at, n_others),
        label_gap(kernel, own, at, n_others),
        np.nansum(np.where(at[:, None, None], attention * says.sum(axis=-1), 0), axis=-1),
    ]
    dims = ("prompt", "layer", "head")
    variables = {
        "score": Variable(
            (*dims, "position"),
            "float",
            "standardised QK score of label positions",
            "QK score less its mean over the prompt's label positions, over their deviation",
        ),
        "position_class": Variable(
            ("prompt", "position"), "int", "class of the demonstration", "number; -1 at padding"
        ),
        "asked_class": Variable(("prompt",), "int", "class of the query", "number"),
        "gap": Variable(
            (*dims, "weight"),
            "float",
            "weight on the right label less that on the others",
            "sum over label positions of attention, of exponentiated scores divided by their sum, "
            "or of attention times the label logit; the right label's less the others' mean",
        ),
        "margin": Variable(("prompt",), "float", "margin", "of the model"),
        "correct": Variable(("prompt",), "bool", "right among the labels", "of the model"),
    }
    predictions = run["predictions"]
    arrays = {
        "score": common.known(standardised(score, at), qk).astype(np.float32),
        "position_class": classes,
        "asked_class": asked,
        "gap": common.known(np.stack(gaps, axis=-1), qk),
        "margin": predictions["margin"].values,
        "correct": predictions["correct"].values,
    }
    return setting.table(
        {name: (variables[name], arrays[name]) for name in variables},
        {
            "prompt": np.arange(len(setting.test)),
            "layer": np.arange(setting.model.n_layers),
            "head": np.arange(setting.model.n_heads),
            "position": qk["position"].values,
            "weight": list(WEIGHTS),
        },
    )


def standardised(score: np.ndarray, at: np.ndarray) -> np.ndarray:
    """Scores (prompt, ..., position) less their mean over `at`, over their deviation there."""
    kept = np.where(at[:, None, None], score, np.nan)
    deviation = np.nanstd(kept, axis=-1, keepdims=True)
    moved = kept - np.nanmean(kept, axis=-1, keepdims=True)
    return np.asarray(moved / np.where(deviation > 0, deviation, 1))


def label_gap(weights: np.ndarray, own: np.ndarray, at: np.ndarray, n_others: int) -> np.ndarray:
    """(prompt, layer, head) sum of weights where the right label stands, less the others' mean."""
    sign = np.where(at, np.where(own, 1.0, -1.0 / n_others), 0.0)
    return np.einsum("plhx,px->plh", np.where(at[:, None, None], weights, 0), sign)


def class_numbers(positions: np.ndarray, queries: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of classes for (prompt, position) and (prompt,) names; -1 for no class."""
    numbers = {name: i for i, name in enumerate(sorted({*positions.ravel()} - {""}))}
    number = np.vectorize(lambda name: numbers.get(name, -1), otypes=[int])
    return number(positions), number(queries)


def retrieved(scores: np.ndarray, classes: np.ndarray, asked: np.ndarray) -> np.ndarray:
    """Whether the class that scores retrieve is the one asked for.

    Parameters
    ----------
    scores
        (prompt, ..., position).
    classes, asked
        (prompt, position), -1 where there is no demonstration; (prompt,).

    Returns
    -------
    array (prompt, ..., rule)
        By the class of the best position, and by the class with the largest mean.
    """
    found = []
    for one, number, wanted in zip(scores, classes, asked, strict=True):
        at = number >= 0
        one, number = one[..., at], number[at]
        kinds = np.unique(number)
        means = np.stack([one[..., number == kind].mean(axis=-1) for kind in kinds], axis=-1)
        nearest, by_mean = number[one.argmax(axis=-1)], kinds[means.argmax(axis=-1)]
        found.append(np.stack([nearest == wanted, by_mean == wanted], axis=-1))
    return np.stack(found)


# ---- cosines ------------------------------------------------------------------------------


def ends(prompts: tt.Prompts) -> np.ndarray:
    """(prompt, position) label positions, the last one, and the last tokens of all texts."""
    role, number = prompts.role, prompts.demonstration
    # A text ends where the next position no longer belongs to it.
    goes_on = (role[:, :-1] == role[:, 1:]) & (number[:, :-1] == number[:, 1:])
    ended = np.pad(~goes_on, ((0, 0), (0, 1)), constant_values=True)
    return np.isin(role, ("label", "last")) | (np.isin(role, ("text", "query")) & ended)


def _cosines(
    setting: Setting, prompts: tt.Prompts, streams: xr.Dataset, centre: xr.Dataset
) -> xr.Dataset:
    """What cosines retrieve, of raw streams and of streams centred by their role's mean."""
    role, named = streams["role"].values, streams["demonstration_class"].values
    classes, asked = class_numbers(named, streams["query_class"].values)
    found, centre = [], measured_prompts(centre)
    for query, key in COMPARED.values():
        queries, keys = of_role(streams, query), of_role(streams, key)
        numbers = np.stack([c[r == key] for c, r in zip(classes, role, strict=True)])
        for centred in (False, True):
            if centred:
                queries = queries - of_role(centre, query).mean(axis=(0, 2), keepdims=True)
                keys = keys - of_role(centre, key).mean(axis=(0, 2), keepdims=True)
            right = retrieved(cosine(queries, keys), numbers, asked)
            found.append(common.known(right, streams))
    shape = (len(COMPARED), 2, *found[0].shape)
    values = np.moveaxis(np.stack(found).reshape(shape), 2, 0)
    variable = Variable(
        ("prompt", "compared", "centred", "layer", "rule"),
        "float",
        "class retrieved by cosine is the query's",
        "cosine of residual streams entering the layer: last position and label positions, or "
        "last tokens of the query's text and of the demonstrations' texts",
    )
    return setting.table(
        {"correct": (variable, values)},
        {
            "prompt": np.arange(len(role)),
            "compared": list(COMPARED),
            "centred": [0, 1],
            "layer": streams["layer"].values,
            "rule": list(RULES),
        },
        prompts,
    )


def of_role(streams: xr.Dataset, role: str) -> np.ndarray:
    """(prompt, layer, n, feature) streams at positions of a role, as many in every prompt."""
    at = streams["role"].values == role
    values = streams["residual"].values
    return np.stack([one[:, here] for one, here in zip(values, at, strict=True)])


def cosine(queries: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """(prompt, layer, n) cosine of (prompt, layer, 1, feature) and (prompt, layer, n, feature).

    0 where a stream is zero, as the last position's is in layer 0 once it is centred: it holds
    the same token in every prompt.
    """
    size = np.linalg.norm(queries, axis=-1) * np.linalg.norm(keys, axis=-1)
    return np.asarray((queries * keys).sum(axis=-1) / np.where(size > 0, size, np.inf))


# ---- the verdict --------------------------------------------------------------------------


def judge(runs: list[xr.DataTree]) -> Judgement:
    """By the rule above."""
    numbers: dict[str, Any] = {}
    numbers["accuracy of the model"] = bootstrap_mean(
        np.concatenate([run["towers"]["correct"].values for run in runs])
    )
    for kind, words in common.KINDS.items():
        together = np.concatenate([summed(run, [common.chosen(run, kind)])[:, 0] for run in runs])
        for place, rule in enumerate(RULES):
            numbers[f"retrieval by summed scores, {rule}, {words}"] = bootstrap_mean(
                together[:, place]
            )
            alone = np.concatenate([single(run, common.chosen(run, kind)) for run in runs])
            numbers[f"retrieval by single heads, mean of them, {rule}, {words}"] = bootstrap_mean(
                alone[:, :, place].mean(axis=1)
            )
            numbers[f"retrieval by the strongest head alone, {rule}, {words}"] = bootstrap_mean(
                alone[:, 0, place]
            )
    for compared in COMPARED:
        for rule in RULES:
            values, chosen = zip(*(best_cosine(run, compared, rule) for run in runs), strict=True)
            words = " and ".join(COMPARED[compared])
            numbers[f"retrieval by cosine of {words} positions, {rule}"] = bootstrap_mean(
                np.concatenate(values)
            )
            numbers[f"layers chosen for cosine of {words} positions, {rule}"] = ", ".join(chosen)
    margin = centred([run["towers"]["margin"].values for run in runs])
    for weight, what in WEIGHTS.items():
        for kind, words in common.KINDS.items():
            x = centred([gap(run, weight, [common.chosen(run, kind)])[0] for run in runs])
            known = np.isfinite(x) & np.isfinite(margin)
            numbers[f"R^2 of {what} with the margin, {words}"] = bootstrap(
                lambda rows, x=x[known], y=margin[known]: signed_r2(x[rows], y[rows]),
                int(known.sum()),
            )
    sets = [random_sets(run) for run in runs]
    drawn = [mean_known(summed(run, s)) for run, s in zip(runs, sets, strict=True)]
    for place, rule in enumerate(RULES):
        every = np.mean([one[:, place] for one in drawn], axis=0)
        numbers[f"retrieval by summed scores, {rule}, mean of random sets"] = float(every.mean())
        numbers[f"retrieval by summed scores, {rule}, 95% of random sets below"] = float(
            np.quantile(every, 0.95)
        )
    for weight, what in WEIGHTS.items():
        gaps = [gap(run, weight, s) for run, s in zip(runs, sets, strict=True)]
        x = np.concatenate([one - mean_known(one, 1)[:, None] for one in gaps], axis=1)
        known = np.isfinite(x).all(axis=0) & np.isfinite(margin)
        every = signed_r2(x[:, known], margin[known])
        numbers[f"R^2 of {what} with the margin, mean of random sets"] = float(every.mean())
        numbers[f"R^2 of {what} with the margin, 95% of random sets below"] = float(
            np.quantile(every, 0.95)
        )
    return _verdict(runs, numbers)


def _verdict(runs: list[xr.DataTree], numbers: dict[str, Any]) -> Judgement:
    words = common.KINDS["writers"]
    chance = 1 / (1 + max(int(run["towers"]["position_class"].values.max()) for run in runs))
    found = numbers[f"retrieval by summed scores, nearest, {words}"]
    bound = numbers["retrieval by summed scores, nearest, 95% of random sets below"]
    cosines = np.concatenate([best_cosine(run, "label", "nearest")[0] for run in runs])
    towers = np.concatenate([summed(run, [common.chosen(run, "writers")])[:, 0, 0] for run in runs])
    less = bootstrap_mean(towers.astype(float) - cosines)
    numbers["retrieval by summed scores less that by cosine, nearest, heads that write"] = less
    fit = numbers[f"R^2 of attention with the margin, {words}"]
    fit_bound = numbers["R^2 of attention with the margin, 95% of random sets below"]
    retrieves = found.low > chance and found.value > bound
    explains = fit.positive and fit.value > fit_bound
    verdict = "undecided"
    if retrieves and explains and not less.negative:
        verdict = "supported"
    elif found.high < chance or fit.negative:
        verdict = "not supported"
    reason = (
        f"By nothing but q.k of the heads that write, the nearest demonstration has the query's "
        f"class in {found} of prompts (random sets up to {bound:.2f}; less that by cosine: {less}; "
        f"the model: {numbers['accuracy of the model']}); their attention explains R^2 {fit} of "
        f"the margin (random sets up to {fit_bound:.2f})."
    )
    return Judgement(verdict, reason, numbers)


def summed(run: xr.DataTree, sets: list[list[tt.Head]] | np.ndarray) -> np.ndarray:
    """(prompt, set, rule) 1 where the scores of a set's heads, summed, retrieve the class."""
    towers = run["towers"]
    score = towers["score"].values  # (prompt, layer, head, position)
    lost = np.isnan(score).all(axis=(1, 2, 3))
    score = np.nan_to_num(score).reshape(len(score), -1, score.shape[-1])
    scores = np.einsum("sh,phx->psx", membership(run, sets), score, optimize=True)
    right = retrieved(scores, towers["position_class"].values, towers["asked_class"].values)
    return np.where(lost[:, None, None], np.nan, right)


def single(run: xr.DataTree, heads: list[tt.Head]) -> np.ndarray:
    """(prompt, head, rule) whether each head's scores alone retrieve the class."""
    return summed(run, [[head] for head in heads])


def gap(run: xr.DataTree, weight: str, sets: list[list[tt.Head]] | np.ndarray) -> np.ndarray:
    """(set, prompt) weight on the right label less the others', summed over a set's heads."""
    values = run["towers"]["gap"].sel(weight=weight).transpose("layer", "head", "prompt").values
    return membership(run, sets) @ values.reshape(-1, values.shape[-1])


def membership(run: xr.DataTree, sets: list[list[tt.Head]] | np.ndarray) -> np.ndarray:
    """(set, head of all heads) 1 where a head belongs to a set."""
    if isinstance(sets, np.ndarray):
        return sets
    found = np.zeros((len(sets), *(run["towers"].sizes[dim] for dim in ("layer", "head"))))
    for row, heads in enumerate(sets):
        for layer, head in heads:
            found[row, layer, head] = 1
    return found.reshape(len(sets), -1)


def random_sets(run: xr.DataTree) -> np.ndarray:
    """`membership` of random sets of as many heads as were chosen."""
    n_heads = run["towers"].sizes["layer"] * run["towers"].sizes["head"]
    rng = np.random.default_rng([int(run.attrs["seed"]), 29])
    found = np.zeros((N_SETS, n_heads))
    for row in found:
        row[rng.permutation(n_heads)[: len(common.chosen(run, "writers"))]] = 1
    return found


def best_cosine(run: xr.DataTree, compared: str, rule: str) -> tuple[np.ndarray, str]:
    """(prompt,) right on the test prompts, at the layer that is best on the fitting ones."""
    fit, test = (
        run[name]["correct"].sel(compared=compared, rule=rule).transpose("centred", "layer", ...)
        for name in ("cosine_fit", "cosine")
    )
    mean = mean_known(fit.values, -1)
    place, layer = np.unravel_index(mean.argmax(), mean.shape)
    name = f"{int(fit['layer'][layer])}{' (centred)' if place else ''}"
    return np.asarray(test.values[place, layer]), name


def centred(parts: list[np.ndarray]) -> np.ndarray:
    """(prompt,) of all seeds, each seed's mean taken out: seeds have heads of their own."""
    return np.concatenate([part - mean_known(part) for part in parts])


def signed_r2(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """(...) squared correlation over the last axis, with the correlation's sign."""
    x, y = (z - z.mean(axis=-1, keepdims=True) for z in (x, y))
    size = np.sqrt((x**2).sum(axis=-1) * (y**2).sum(axis=-1))
    r = (x * y).sum(axis=-1) / np.where(size > 0, size, np.inf)
    return np.asarray(r * np.abs(r))


# ---- the picture --------------------------------------------------------------------------


def draw(runs: list[xr.DataTree], judgement: Judgement) -> Any:
    """Accuracy of retrievers; how much of the margin sums explain; the margin by attention."""
    plt = common.pyplot()
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(11, 4), layout="constrained")
    numbers, kinds = judgement.numbers, common.KINDS
    rows = {
        "q.k, heads\nthat write": "retrieval by summed scores, {}, " + kinds["writers"],
        "q.k, in-con-\ntext heads": "retrieval by summed scores, {}, " + kinds["in_context"],
        "cosine, last\nand labels": "retrieval by cosine of last and label positions, {}",
        "cosine,\ntexts": "retrieval by cosine of query and text positions, {}",
    }
    for place, name in enumerate(rows.values()):
        for side, rule in enumerate(RULES):
            x = place + 0.36 * side - 0.18
            words = {"nearest": "nearest demonstration", "mean": "largest mean of a class"}[rule]
            style.bar(left, x, numbers[name.format(rule)], side, words, place == 0)
    style.bar(left, len(rows), numbers["accuracy of the model"], 2, "", False)
    bound = numbers["retrieval by summed scores, nearest, 95% of random sets below"]
    left.axhline(bound, color=style.GREY, ls=":", label="95% of random sets, nearest")
    left.set_xticks(range(len(rows) + 1), [*rows, "the model"], fontsize=7)
    left.set(
        ylim=(0, 1.35),
        yticks=(0, 0.5, 1),
        ylabel="accuracy",
        title="Class retrieved is the query's",
    )
    left.legend(frameon=False, fontsize=8, loc="upper left")
    for place, what in enumerate(WEIGHTS.values()):
        for side, words in enumerate(kinds.values()):
            estimate = numbers[f"R^2 of {what} with the margin, {words}"]
            style.bar(middle, place + 0.36 * side - 0.18, estimate, side, words, place == 0)
        bound = numbers[f"R^2 of {what} with the margin, 95% of random sets below"]
        words = "95% of random sets" if place == 0 else None
        middle.plot([place - 0.36, place + 0.36], [bound, bound], ":", color="black", label=words)
    names = ["attention", "exponentiated\nscores", "weighted\nOV"]
    middle.set_xticks(range(len(WEIGHTS)), names)
    middle.axhline(0, color=style.GREY, lw=0.8)
    middle.set(ylabel="signed $R^2$", title="Margin explained by sums")
    middle.legend(frameon=False, fontsize=8)
    for number, run in enumerate(runs):
        x = gap(run, "attention", [common.chosen(run, "writers")])[0]
        y = run["towers"]["margin"].values
        right.scatter(x, y, s=10, color=style.COLOURS[number % 6], label=f"seed {number}")
    right.set(
        xlabel="attention on the right label less the other,\nsum over heads that write",
        ylabel="margin (logits)",
        title="Every test prompt",
    )
    right.axhline(0, color=style.GREY, lw=0.8)
    right.legend(frameon=False, fontsize=8)
    return figure


EXPERIMENT = Experiment(
    number=4,
    name="two-towers",
    title="Two towers as metric learning",
    claim="The query and key matrices of the heads that write the answer retrieve demonstrations "
    "of the query's class, and the sum of similarities per label explains the model's margin.",
    headline="Query and key matrices are two towers that measure similarity; it decides how much "
    "label information flows (no retrieval accuracy of the towers is known to be reported).",
    rule=RULE,
    measure=measure,
    judge=judge,
    draw=draw,
)

if __name__ == "__main__":
    from twotower.cli import main

    main(["experiments", "run", __file__, *sys.argv[1:]])
