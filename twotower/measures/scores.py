"""Two-tower scores of heads: QK AUC (finds right demonstrations), OV AUC (reads labels)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from ..errors import InputError
from ..results import make_dataset, measured_prompts
from ..results.forms import with_dims
from ..results.together import alike
from ..statistics import mean_known

if TYPE_CHECKING:
    import xarray as xr


BY_HEAD = ("prompt", "layer", "head")
BY_POSITION = (*BY_HEAD, "position", "role")
NEEDED = {
    "qk": (*BY_POSITION, "demonstration_class", "query_class"),
    "ov": (*BY_POSITION, "label", "label_text"),
    "effects": BY_HEAD,
}
"""Dims and coordinates that scores are computed from, by group."""


def two_tower_scores(run: xr.DataTree) -> xr.Dataset:
    """Return the QK AUC, OV AUC and mean effect of every head.

    Parameters
    ----------
    run
        A run with the groups `qk` and `ov`, such as the result of `analyze`.

    Returns
    -------
    xarray.Dataset
        (layer, head): qk_auc, qk_auc_content, ov_auc, each with the size of the difference
        (qk_size, ov_size), and margin_drop if the run has effects. Chance of an AUC is 0.5. A
        head's AUC is NaN if no prompt allows a comparison. Prompts that are missing (not measured
        yet, or not finite) are left out.

    Raises
    ------
    InputError
        If the run lacks `qk` or `ov` or a dim of theirs, its prompts have answers of their own, or
        its groups were measured on different weights or prompts.

    Notes
    -----
    An AUC does not measure size. If a head's values encode a label's token at all, the label
    logits are nearly equal wherever that label stands. Their sign then makes the OV AUC 0 or 1,
    even in heads that write almost nothing. So look at the size beside it too.
    """
    for name in ("qk", "ov"):
        if name not in getattr(run, "children", ()):
            raise InputError(f"two-tower scores need the group {name!r}; analyze with it")
    names = [name for name in ("qk", "ov", "effects") if name in run.children]
    parts = alike({x: with_dims(measured_prompts(run.children[x]), x, *NEEDED[x]) for x in names})
    qk, ov = parts[:2]
    if qk.attrs.get("answers") == "by prompt":
        raise InputError(
            "two-tower scores compare the classes of demonstrations, and these prompts have right "
            "and wrong answers of their own"
        )
    if ov.sizes["label"] < 2:
        raise InputError("ov has a single label, and two-tower scores compare labels")
    arrays = {"qk_auc": qk_auc(qk["score"]), "qk_size": qk_size(qk["score"])}
    if "score_content" in qk:
        arrays["qk_auc_content"] = qk_auc(qk["score_content"])
    arrays["ov_auc"] = ov_auc(ov["label_logit"])
    arrays["ov_size"] = ov_size(ov["label_logit"])
    for effects in parts[2:]:
        arrays["margin_drop"] = effects["margin_drop"].mean("prompt").values
    about = {k: v for k, v in qk.attrs.items() if not k.startswith("twotower_")}
    # Runs stored by older versions do not count values that are not finite.
    about["not_finite"] = int(about.get("not_finite", 0))
    about["not_finite_values"] = sum(int(x.attrs.get("not_finite_values", 0)) for x in parts)
    about["settings"] = json.dumps({"prompts": qk.sizes["prompt"]})
    coordinates = {"layer": qk["layer"].values, "head": qk["head"].values}
    return make_dataset("scores", arrays, coordinates, about)


def scores_by_prompt(qk: xr.DataArray, ov: xr.DataArray) -> dict[str, np.ndarray]:
    """Return the AUCs and sizes (prompt, layer, head) of every prompt.

    Parameters
    ----------
    qk, ov
        Scores and label logits, as in `qk_auc` and `ov_auc`.
    """
    functions = ((qk_auc, qk), (qk_size, qk), (ov_auc, ov), (ov_size, ov))
    return {
        function.__name__: np.stack(
            [function(values.isel(prompt=[row])) for row in range(values.sizes["prompt"])]
        )
        for function, values in functions
    }


def qk_auc(scores: xr.DataArray) -> np.ndarray:
    """Return the (layer, head) probability that labels of the query's class score higher.

    Compares label positions of the query's class with those of other classes.

    Parameters
    ----------
    scores
        (prompt, layer, head, position), with role, demonstration_class and query_class.
    """
    found = []
    for one in _prompts(scores):
        at = one["role"].values == "label"
        same = one["demonstration_class"].values[at] == one["query_class"].item()
        found.append(auc(one.transpose("position", "layer", "head").values[at], same))
    return _mean(found, scores)


def qk_size(scores: xr.DataArray) -> np.ndarray:
    """Return (layer, head) how much higher labels of the query's class score, in the mean.

    Parameters
    ----------
    scores
        As in `qk_auc`.
    """
    found = []
    for one in _prompts(scores):
        at = one["role"].values == "label"
        same = one["demonstration_class"].values[at] == one["query_class"].item()
        found.append(_gap(one.transpose("position", "layer", "head").values[at], same))
    return _mean(found, scores)


def ov_size(logits: xr.DataArray) -> np.ndarray:
    """Return (layer, head) how much more a label's own positions raise it, in the mean.

    Parameters
    ----------
    logits
        As in `ov_auc`.
    """
    found = [_gap(values, held) for values, held in _labels(logits)]
    return _mean(found, logits)


def ov_auc(logits: xr.DataArray) -> np.ndarray:
    """Return the (layer, head) probability that a label's own positions raise it more.

    Compares label positions that hold the label with those that hold another one.

    Parameters
    ----------
    logits
        (prompt, layer, head, position, label), with role and label_text.
    """
    return _mean([auc(values, held) for values, held in _labels(logits)], logits)


def _labels(logits: xr.DataArray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield each prompt's and label's logits less the others' mean, and which positions hold it.

    They are (label position, layer, head) and (label position,).
    """
    labels = logits["label"].values
    for one in _prompts(logits):
        at = one["role"].values == "label"
        held = one["label_text"].values[at]
        values = one.transpose("position", "layer", "head", "label").values[at]
        total = values.sum(axis=-1)
        for number, label in enumerate(labels):
            others = (total - values[..., number]) / (len(labels) - 1)
            yield values[..., number] - others, held == label


def _gap(values: np.ndarray, positive: np.ndarray) -> np.ndarray | None:
    """Return the positives' mean less the others' of values (n, ...); None if one is empty."""
    high, low = values[positive], values[~positive]
    if not len(high) or not len(low):
        return None
    found: np.ndarray = mean_known(high) - mean_known(low)
    return found


def _prompts(array: xr.DataArray) -> Iterator[xr.DataArray]:
    """Yield each prompt's array. Reads a stored run in blocks of prompts."""
    for start in range(0, array.sizes["prompt"], 16):
        block = array.isel(prompt=slice(start, start + 16)).load()
        for prompt in range(block.sizes["prompt"]):
            yield block.isel(prompt=prompt)


def auc(values: np.ndarray, positive: np.ndarray) -> np.ndarray | None:
    """Return the probability that a positive's value exceeds a negative's; ties count half.

    Parameters
    ----------
    values
        (n, ...).
    positive
        (n,) boolean.

    Returns
    -------
    array (...) or None
        None if there are no positives or no negatives. Pairs with NaN are left out; if no pair
        remains, the result is NaN.
    """
    high, low = values[positive][:, None], values[~positive][None]
    if not high.size or not low.size:
        return None
    wins = (high > low) + 0.5 * (high == low)
    unknown = np.isnan(high) | np.isnan(low)
    if unknown.any():
        wins = np.where(unknown, np.nan, wins)
        return mean_known(wins.reshape(-1, *wins.shape[2:]))
    found: np.ndarray = wins.mean(axis=(0, 1))
    return found


def _mean(found: list[np.ndarray | None], measured: xr.DataArray) -> np.ndarray:
    """Return the (layer, head) mean over the comparisons that are not None; NaN if all are."""
    kept = [x for x in found if x is not None]
    if not kept:
        return np.full((measured.sizes["layer"], measured.sizes["head"]), np.nan)
    return mean_known(np.array(kept))
