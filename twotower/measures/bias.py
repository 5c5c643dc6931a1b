"""Biases towards a label: majority-label bias and recency bias."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..checks import check_is, one_of, several, whole
from ..errors import InputError
from ..results import make_dataset
from ..results.forms import MISSING, with_dims
from ..results.together import alike

if TYPE_CHECKING:
    import xarray as xr

    from ..prompts import Prompts
    from ..statistics import Estimate

BIASES = ("logit_bias", "count_bias")
"""The two measures of a bias."""


def majority_label(prompts: Prompts) -> np.ndarray:
    """Return the most frequent label of each prompt's demonstrations.

    Parameters
    ----------
    prompts
        Prompts whose demonstrations' labels are counted.

    Returns
    -------
    array (prompt,)
        Texts of the labels that majority-label bias favours (Yu & Ananiadou 2024).

    Raises
    ------
    InputError
        If the most frequent label of a prompt is not unique.
    """
    check_is(prompts, "Prompts", "prompts")
    _needs_labels(prompts)
    found = []
    for number, held in enumerate(_labels_held(prompts)):
        counts = [int((held == label).sum()) for label in prompts.labels]
        most = max(counts)
        if counts.count(most) > 1:
            shown = dict(zip(prompts.labels, counts, strict=True))
            raise InputError(f"prompt {number} has no most frequent label: {shown}")
        found.append(prompts.labels[counts.index(most)])
    return np.array(found, dtype=object)


def recent_label(prompts: Prompts) -> np.ndarray:
    """Return the label of each prompt's last demonstration.

    Parameters
    ----------
    prompts
        Prompts whose last label is read.

    Returns
    -------
    array (prompt,)
        Texts of the labels that recency bias favours (Yu & Ananiadou 2024).

    Raises
    ------
    InputError
        If a prompt has no demonstrations.
    """
    check_is(prompts, "Prompts", "prompts")
    _needs_labels(prompts)
    found = []
    for number, held in enumerate(_labels_held(prompts)):
        if not len(held):
            raise InputError(f"prompt {number} has no demonstrations")
        found.append(held[-1])
    return np.array(found, dtype=object)


def label_bias(predictions: xr.Dataset, favoured: Sequence[str] | np.ndarray) -> xr.Dataset:
    """Return how strongly each prompt's answer is biased towards its favoured label.

    The mean over prompts is the bias if right answers are balanced: among the prompts that
    favour a label, each label is right equally often. If labels are favoured in different
    numbers of prompts, average over the prompts of each favoured label first, then over the
    labels, as `bias_reduction` does. This cancels the model's preference for a label's word.

    Parameters
    ----------
    predictions
        Result of `predict`, or the group `predictions` of a run.
    favoured
        (prompt,) text of the favoured label, such as the result of `majority_label` or
        `recent_label`.

    Returns
    -------
    xarray.Dataset
        logit_bias (prompt): the favoured label's logit minus the mean of the other labels'.
        count_bias (prompt): 1 if the favoured label is predicted, else 0, minus 1 over the
        number of labels. favoured (prompt). After Yu & Ananiadou (2024), whose exact formula
        we do not know. Both biases are NaN where the prompt is missing in `predictions`.

    Raises
    ------
    InputError
        If `predictions` holds no logits, or `favoured` is not one label per prompt.
    """
    # Of labels of several tokens there are only log-probabilities, whose differences are the same.
    name = "logit" if hasattr(predictions, "logit") else "logprob"
    if not {"prompt", "label"} <= set(getattr(getattr(predictions, name, None), "dims", ())):
        raise InputError("label_bias needs the result of predict: logit (prompt, label)")
    predictions = with_dims(predictions, "predictions", "prompt", "label")
    labels = [str(label) for label in predictions["label"].values]
    if len(labels) < 2:
        raise InputError("there is a single label, and a bias is one towards a label over others")
    favoured = np.asarray(several("favoured", _aligned(favoured, predictions)), dtype=object)
    n = predictions.sizes["prompt"]
    if favoured.shape != (n,):
        raise InputError(f"favoured has the shape {favoured.shape}; there are {n} prompts")
    for label in favoured:
        if label not in labels:
            raise InputError(f"favoured label {label!r} is not among {', '.join(labels)}")
    logit = predictions[name].values
    column = np.array([labels.index(label) for label in favoured])
    own = logit[np.arange(n), column]
    others = (logit.sum(axis=1) - own) / (len(labels) - 1)
    said = (logit.argmax(axis=1) == column) - 1 / len(labels)
    known = np.isfinite(logit).all(axis=1)
    arrays = {
        "logit_bias": np.where(known, own - others, np.nan),
        "count_bias": np.where(known, said, np.nan),
        "favoured": favoured,
    }
    names = ("prompt", "gold", "query_class", *MISSING)
    coordinates = {name: predictions[name].values for name in names if name in predictions.coords}
    about = {k: v for k, v in predictions.attrs.items() if not k.startswith("twotower_")}
    about["settings"] = json.dumps({"predictions": json.loads(about.get("settings", "{}"))})
    return make_dataset("bias", arrays, coordinates, about)


def bias_reduction(
    before: xr.Dataset, after: xr.Dataset, kind: str = "logit_bias", seed: int = 0
) -> Estimate | None:
    """Return the share of a bias that an edit removes: 1 - after / before.

    Biases are averaged over the prompts of each favoured label, then over the labels. Prompts
    that are missing before or after are left out of both.

    Parameters
    ----------
    before, after
        Results of `label_bias` for the same prompts, without and with the edit.
    kind
        "logit_bias" or "count_bias".
    seed
        Seed of the resampling.

    Returns
    -------
    Estimate or None
        Share with a 95% bootstrap interval; each draw of a prompt takes its values before and
        after together. None if the interval of the bias before contains 0, because there is
        nothing to reduce.

    Raises
    ------
    InputError
        If the two differ in prompts or favoured labels, or no prompt is finite in both.
    """
    from ..statistics import reduction

    one_of("kind", kind, BIASES)
    whole("seed", seed)
    for biases in (before, after):
        if getattr(getattr(biases, "favoured", None), "dims", ()) != ("prompt",):
            raise InputError("bias_reduction needs the result of label_bias, before and after")
    # Other weights are allowed: an edit may be a training.
    about = {"prompts_hash": "prompts"}
    before, after = alike({"the bias before": before, "that after": after}, about)
    if before["favoured"].values.tolist() != after["favoured"].values.tolist():
        raise InputError("the biases are towards other labels")
    values = np.stack([before[kind].values, after[kind].values]).astype(float)
    known = np.isfinite(values).all(axis=0)
    if not known.any():
        raise InputError(
            "no prompt is finite both before and after: load the model with dtype='float32' or "
            "'bfloat16'"
        )
    # Weights that make each favoured label count equally in the mean.
    _, label, counts = np.unique(
        before["favoured"].values[known].astype(str), return_inverse=True, return_counts=True
    )
    weights = len(label) / (len(counts) * counts[label])
    first, second = values[:, known] * weights
    return reduction(first, second, seed)


def _labels_held(prompts: Prompts) -> list[np.ndarray]:
    """Return the label of each demonstration, by prompt, in order; it may have several tokens."""
    found = []
    rows = zip(prompts.label_text, prompts.demonstration, prompts.where("labels"), strict=True)
    for text, number, at in rows:
        _, first = np.unique(number[at], return_index=True)
        found.append(text[at][np.sort(first)])
    return found


def _aligned(favoured: Any, predictions: xr.Dataset) -> Any:
    """Return favoured labels that name their prompts in the order of the predictions."""
    if "prompt" not in getattr(favoured, "coords", ()):
        return favoured
    try:
        return favoured.sel(prompt=predictions["prompt"]).values
    except (KeyError, ValueError) as error:
        raise InputError("favoured names other prompts than the predictions") from error


def _needs_labels(prompts: Prompts) -> None:
    if prompts.answers.by_prompt:
        raise InputError("biases are towards labels, and these prompts have answers of their own")
