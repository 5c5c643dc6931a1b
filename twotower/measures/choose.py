"""Choice of the heads that in-context learning depends on most."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ..checks import one_of, shown, whole
from ..errors import InputError
from ..results import measured_prompts
from ..results.forms import with_dims

if TYPE_CHECKING:
    import xarray as xr

    from ..head import Head

GROUP_OF = {"margin_drop": "effects", "label_logit": "attribution"}
"""Variables by which heads can be ranked, and their groups."""


def in_context_heads(
    effects: xr.Dataset | xr.DataTree,
    k: int = 12,
    *,
    label: str | None = None,
    by: str = "margin_drop",
) -> list[Head]:
    """Return the heads that in-context learning depends on most.

    Parameters
    ----------
    effects
        Result of `head_effects` (or of `attribution` for by="label_logit"), or a run that
        contains it.
    k
        Number of heads.
    label
        If given, rank heads for this label, on the prompts where it is right: by the drop of
        its log-probability under knock-out (the foo-heads and bar-heads of Yu & Ananiadou
        2024), or by the logit that they write for it.
    by
        "margin_drop": heads whose knock-out lowers the margin most; they may act through
        later heads. "label_logit": heads whose own output raises the right label's logit
        most, relative to the mean of the other labels'; they write the answer.

    Returns
    -------
    list of Head
        Strongest first, by the mean over prompts. A larger k only adds heads. Prompts that
        are missing (not measured yet, or not finite) do not count.

    Raises
    ------
    InputError
        If k is out of range, fewer than k heads have a finite effect, or the label is unknown
        or never right.
    """
    one_of("by", by, GROUP_OF)
    effects = getattr(effects, "children", {}).get(GROUP_OF[by], effects)
    dims = effects[by].dims if hasattr(effects, "data_vars") and by in effects else ()
    if not {"prompt", "layer", "head"} <= set(dims) or "position" in dims:
        source = "head_effects" if by == "margin_drop" else "attribution"
        raise InputError(f"by={by!r} needs the result of {source}, or a run that holds it")
    needed = ("prompt", "layer", "head", *(() if label is None else ("gold",)))
    given = with_dims(measured_prompts(effects), GROUP_OF[by], *needed)
    values = _strength(given, label, by)
    mean = values.where(np.isfinite(values)).mean("prompt")
    ranked = int(np.isfinite(mean).sum())
    if not ranked:
        raise InputError(
            "no effect is known: prompts are not measured yet, or not finite (then load the model "
            "with dtype='float32' or 'bfloat16')"
        )
    whole("k", k, 1, mean.size)
    if k > ranked:
        raise InputError(f"k={k}, but only {ranked} of {mean.size} heads have finite effects")
    return strongest(mean, k)


def strongest(values: xr.DataArray, k: int) -> list[Head]:
    """Return the k heads with the largest finite values, fewer if fewer are finite.

    Parameters
    ----------
    values
        (layer, head), in any order of dims.
    k
        Number of heads.
    """
    from ..head import Head

    values = values.transpose("layer", "head")
    order = np.argsort(-values.values, axis=None, kind="stable")[:k]  # NaN last
    rows, columns = np.unravel_index(order, values.shape)
    layers, heads = values["layer"].values, values["head"].values
    return [
        Head(int(layers[x]), int(heads[y]))
        for x, y in zip(rows, columns, strict=True)
        if np.isfinite(values.values[x, y])
    ]


def _strength(effects: xr.Dataset, label: str | None, by: str) -> xr.DataArray:
    """Return (prompt, layer, head) values to rank heads by, for the prompts that count."""
    if label is None:
        if by == "margin_drop":
            return effects[by]
        return above_others(effects[by])
    name = "logprob_drop" if by == "margin_drop" else by
    if name not in effects:
        raise InputError("a label's heads need effects with logprobs=True")
    if "label" not in effects[name].dims:
        raise InputError(f"{name} has no dim 'label'; use a result with all its labels")
    known = [str(x) for x in effects["label"].values]
    if not isinstance(label, str) or label not in known:
        raise InputError(f"label {shown(label)} is not among {', '.join(known)}")
    right = effects["gold"] == label
    if not right.any():
        raise InputError(f"label {label!r} is the right answer of no prompt")
    values = effects[name] if by == "margin_drop" else above_others(effects[name])
    if "label" in values.dims:
        values = values.sel(label=label)
    return values.isel(prompt=np.flatnonzero(right.values))


def above_others(logits: xr.DataArray) -> xr.DataArray:
    """Return the right label's logit minus the mean of the others', (..., label) to (...).

    Parameters
    ----------
    logits
        Array with the dim `label` and the coordinate `gold`. If any logit is NaN, the result
        is NaN.

    Raises
    ------
    InputError
        If the label that is right in a prompt has been selected away.
    """
    if "label" not in logits.dims:
        raise InputError(f"{logits.name} has no dim 'label'; use a result with all its labels")
    if "gold" not in logits.coords:
        raise InputError(f"{logits.name} lacks the coordinate 'gold', which measures give")
    known, gold = (np.atleast_1d(logits[x].values).tolist() for x in ("label", "gold"))
    gone = {x for x in gold if isinstance(x, str)} - {*known}  # NaN where a prompt is missing
    if gone:
        raise InputError(
            f"the right answer {min(gone)!r} of some prompts is not among the labels "
            f"{', '.join(known)}; select prompts with these answers, or keep all labels"
        )
    if logits.sizes["label"] == 1:
        return logits.isel(label=0, drop=True)
    is_gold = logits["label"] == logits["gold"]
    right = logits.where(is_gold, 0).sum("label", skipna=False)
    others = logits.where(~is_gold, 0).sum("label", skipna=False)
    return right - others / (logits.sizes["label"] - 1)
