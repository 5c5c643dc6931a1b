"""Biases towards a label for other reasons than similarity: its frequency, its nearness."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from ..checks import check_is, one_of, whole
from ..errors import InputError
from ..results import make_dataset
from ..results.forms import MISSING

if TYPE_CHECKING:
    import xarray as xr

    from ..prompts import Prompts
    from ..statistics import Estimate

BIASES = ("logit_bias", "count_bias")
"""The two ways in which a bias is measured."""


def majority_label(prompts: Prompts) -> np.ndarray:
    """The label that most demonstrations of each prompt have.

    Parameters
    ----------
    prompts
        Their label positions are counted.

    Returns
    -------
    array (prompt,)
        Labels' texts: what majority-label bias favours (Yu & Ananiadou 2024).

    Raises
    ------
    InputError
        If in a prompt no label is more frequent than all others.
    """
    check_is(prompts, "Prompts", "prompts")
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
    """The label of the demonstration that is nearest to each prompt's end.

    Parameters
    ----------
    prompts
        Their last label positions are read.

    Returns
    -------
    array (prompt,)
        Labels' texts: what recency bias favours (Yu & Ananiadou 2024).

    Raises
    ------
    InputError
        If a prompt has no demonstrations.
    """
    check_is(prompts, "Prompts", "prompts")
    found = []
    for number, held in enumerate(_labels_held(prompts)):
        if not len(held):
            raise InputError(f"prompt {number} has no demonstrations")
        found.append(held[-1])
    return np.array(found, dtype=object)


def label_bias(predictions: xr.Dataset, favoured: Sequence[str] | np.ndarray) -> xr.Dataset:
    """How far each prompt's answer leans towards a label.

    The mean over prompts is the bias, provided that right answers are balanced: each label
    is right equally often where a label is favoured. Where labels are favoured in different
    numbers of prompts, take the mean for each favoured label first and then their mean, as
    `bias_reduction` does, so that a model's liking of one label's word cancels.

    Parameters
    ----------
    predictions
        What `predict` returned, or the group of a run.
    favoured
        (prompt,) text of the favoured label, such as `majority_label` or `recent_label`
        gives it.

    Returns
    -------
    xarray.Dataset
        logit_bias (prompt): the favoured label's logit less the mean of the others'.
        count_bias (prompt): 1 where the favoured label is predicted, else 0, less 1 over
        the number of labels. favoured (prompt). After Yu & Ananiadou (2024), whose own
        formula is not known here. Both biases are NaN where the prompt is missing in
        `predictions`.

    Raises
    ------
    InputError
        If `predictions` holds no logits, or `favoured` is not one label per prompt.
    """
    if not {"prompt", "label"} <= set(getattr(getattr(predictions, "logit", None), "dims", ())):
        raise InputError("label_bias needs what predict returns: logit (prompt, label)")
    labels = [str(label) for label in predictions["label"].values]
    favoured = np.asarray(favoured, dtype=object)
    n = predictions.sizes["prompt"]
    if favoured.shape != (n,):
        raise InputError(f"favoured has the shape {favoured.shape}; there are {n} prompts")
    for label in favoured:
        if label not in labels:
            raise InputError(f"favoured label {label!r} is not among {', '.join(labels)}")
    logit = predictions["logit"].transpose("prompt", "label").values
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
    """Share of a bias that an edit takes away: 1 - after / before.

    Parameters
    ----------
    before, after
        What `label_bias` returned for the same prompts, without and with the edit.
    kind
        "logit_bias" or "count_bias".
    seed
        Seed of the resampling.

    Returns
    -------
    Estimate or None
        With a 95% bootstrap interval over prompts, each drawn with both its values. None
        where the interval of the bias before holds 0: there is nothing to reduce. Biases
        are means over prompts for each favoured label, and then over these labels. Prompts
        that are missing before or after are left out of both.

    Raises
    ------
    InputError
        If the two are of other prompts, favour other labels, or have no prompt in common that
        is finite in both.
    """
    from ..statistics import reduction

    one_of("kind", kind, BIASES)
    whole("seed", seed)
    for biases in (before, after):
        if getattr(getattr(biases, "favoured", None), "dims", ()) != ("prompt",):
            raise InputError("bias_reduction needs what label_bias returns, before and after")
    same = before.attrs.get("prompts_hash") == after.attrs.get("prompts_hash")
    if not same or before["favoured"].values.tolist() != after["favoured"].values.tolist():
        raise InputError("the biases are of other prompts, or towards other labels")
    values = np.stack([before[kind].values, after[kind].values]).astype(float)
    known = np.isfinite(values).all(axis=0)
    if not known.any():
        raise InputError(
            "no prompt is finite both before and after: load the model with dtype='float32' or "
            "'bfloat16'"
        )
    # Weights that give each favoured label the same part in the mean.
    _, label, counts = np.unique(
        before["favoured"].values[known].astype(str), return_inverse=True, return_counts=True
    )
    weights = len(label) / (len(counts) * counts[label])
    first, second = values[:, known] * weights
    return reduction(first, second, seed)


def _labels_held(prompts: Prompts) -> list[np.ndarray]:
    """For each prompt the labels of its demonstrations, in order."""
    return [text[at] for text, at in zip(prompts.label_text, prompts.where("labels"), strict=True)]
