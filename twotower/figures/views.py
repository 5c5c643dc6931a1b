"""Views of a run for figures, tables and reports: its heads, and its single prompts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from ..checks import whole
from ..errors import InputError
from ..head import as_head
from ..prompts.segments import ROLES
from ..results import measured_prompts
from ..results.forms import with_dims
from ..results.missing import finite_prompts
from ..results.schema import BY_POSITION, head_columns

if TYPE_CHECKING:
    import xarray as xr

    from ..head import Head

IN_VIEW = ("gold", "query_class", "role", "label_text", "demonstration_class")
"""Coordinates that the view of a prompt shows."""

N_MARKED = 12
"""Default number of marked heads."""


def one_run(run: Any, part: str | None = None) -> xr.DataTree:
    """Return a run, or one part of it; a dataset counts as a run with one group.

    Raises
    ------
    InputError
        If it is not a run, the part is missing, or a run with parts has none chosen.
    """
    import xarray as xr

    if isinstance(run, (xr.Dataset, xr.DataTree)) and "twotower_group" in run.attrs:
        run = run if isinstance(run, xr.Dataset) else run.to_dataset()
        root = xr.Dataset(attrs={k: v for k, v in run.attrs.items() if k != "twotower_group"})
        run = xr.DataTree.from_dict({"/": root, run.attrs["twotower_group"]: run})
    if not getattr(run, "children", None):
        raise InputError(f"a {type(run).__name__} is not a run; use what analyze or open returned")
    parts = json.loads(run.attrs.get("twotower_parts", "[]"))
    if part is not None and part not in parts:
        known = f"parts are {', '.join(parts)}" if parts else "it has none"
        raise InputError(f"the run has no part {part!r}; {known}")
    if parts and part is None:
        raise InputError(f"the run has several parts; choose one of {', '.join(parts)}")
    found: xr.DataTree = run if part is None else run[part]
    return found


def part_of(run: xr.DataTree, name: str, *needed: str) -> xr.Dataset:
    """Return the measured prompts of a group, which must have these dims and coordinates.

    Raises
    ------
    InputError
        If a dim is missing, for example after `isel` or a mean, or there is another one.
    """
    return with_dims(measured_prompts(run.children[name]), name, *needed)


def head_table(run: xr.DataTree | xr.Dataset) -> xr.Dataset:
    """Return one number of each kind for every head.

    Parameters
    ----------
    run
        Result of `analyze` or `open`. Prompts that are not measured yet or not finite are
        left out.

    Returns
    -------
    xarray.Dataset
        (layer, head): the schema's columns of heads that the run has, averaged over prompts:
        margin_drop, label_logit (of the head's own output, the right label's minus the mean of
        the others'), qk_auc, qk_auc_content, ov_auc, and those of other measures.

    Raises
    ------
    InputError
        If the run has no numbers of heads.
    """
    import xarray as xr

    from ..measures.choose import above_others
    from ..measures.scores import two_tower_scores

    run = one_run(run)
    found: dict[str, xr.DataArray] = {}
    columns = head_columns()
    for name, (group, variable) in columns.items():
        if group not in run.children or group == "scores":
            continue
        part = part_of(run, group, *variable.dims)
        if name not in part:
            continue
        array, about = part[name], dict(part[name].attrs)
        if "label" in array.dims:
            array = above_others(array)
            about["long_name"] = f"{variable.long_name}, right less others"
        mean = array.mean("prompt") if "prompt" in array.dims else array
        found[name] = mean.assign_attrs(about)
    scores = part_of(run, "scores", "layer", "head") if "scores" in run.children else None
    if scores is not None and _of_others(run, scores):
        scores = None
    unscored = scores is None or bool(scores["qk_auc"].isnull().all())
    by_prompt = run.attrs.get("answers") == "by prompt"
    if unscored and {"qk", "ov"} <= set(run.children) and prompts_of(run) and not by_prompt:
        for name in ("qk", "ov"):
            part_of(run, name, "prompt", "layer", "head", "position")
        scores = two_tower_scores(run)  # an unfinished run has no scores yet
    if scores is not None:
        for key, array in scores.data_vars.items():
            found.setdefault(str(key), array)
    if not found:
        raise InputError(f"the run has no numbers of heads; it has {', '.join(run.children)}")
    kept = {name: x.drop_vars(set(x.coords) - {"layer", "head"}) for name, x in found.items()}
    table = xr.Dataset(
        {name: kept[name].transpose("layer", "head") for name in columns if name in kept}
    )
    return table.compute().sortby(["layer", "head"])


def _of_others(run: xr.DataTree, scores: xr.Dataset) -> bool:
    """Check whether scores are of more or fewer prompts than the run has, as after `isel`.

    Prompts may be repeated, as in a bootstrap, or the same number may stand for several, as after
    runs were joined.
    """
    if "qk" not in run.children:
        return False
    known = json.loads(scores.attrs.get("settings", "{}")).get("prompts")
    now = measured_prompts(run.children["qk"]).get("prompt")
    return known is not None and now is not None and {known} != {now.size, len({*now.values})}


def marked_heads(
    run: xr.DataTree, heads: Sequence[Head] | None = None, k: int = N_MARKED
) -> list[Head]:
    """Return the heads to mark: the given ones, the run's own, or the strongest.

    Heads without a finite effect are never among the strongest.

    Parameters
    ----------
    run
        Result of `analyze` or `open`.
    heads
        Heads; None for the run's own (attribute `in_context_heads`), or without these the k
        with the largest effect.
    k
        Number of heads.
    """
    if heads is not None:
        if not isinstance(heads, (list, tuple)):
            raise InputError(f"heads={heads!r} must be a list of heads")
        return [as_head(head) for head in heads]
    named = json.loads(run.attrs.get("in_context_heads", "[]"))
    if named:
        return [as_head(head) for head in named]
    if "effects" not in run.children or not prompts_of(run):
        return []
    from ..measures.choose import strongest

    # Read only the effects: the whole head table may read every score of a stored run.
    drop = part_of(run, "effects", "prompt", "layer", "head")["margin_drop"]
    return strongest(drop.mean("prompt").sortby(["layer", "head"]).compute(), k)


def prompts_of(run: xr.DataTree) -> list[int]:
    """Return the numbers of the prompts that have values in all groups with prompts."""
    found: list[int] | None = None
    for name in ("qk", "ov", "effects", "attribution", "predictions"):
        if name in run.children and "prompt" in run[name].dims:
            here = [int(number) for number in measured_prompts(run.children[name])["prompt"].values]
            found = here if found is None else [number for number in found if number in set(here)]
    return found or []


@dataclass
class PromptView:
    """A prompt without padding, with the values of every head at its positions.

    Attributes
    ----------
    number
        Number of the prompt.
    tokens, roles, label_texts, classes
        (position,) texts.
    positions
        (position,) counted from the end; the last is 0.
    gold, query_class
        Right label, and the query's class; "" without classes.
    answers
        The prompt's own answers by label, as texts; empty if all prompts share their labels.
    labels, layers, heads
        Coordinates of the values.
    values
        By name as in `BY_POSITION`: (layer, head, position); label_logit has a last axis of
        labels. NaN at positions that were not stored.
    answer
        The model's answer if the run has it: logits and logprobs by label, margin, top_token.
    top_tokens
        (position,) most likely token of the value-output vector, by head.
    """

    number: int
    tokens: np.ndarray
    roles: np.ndarray
    label_texts: np.ndarray
    classes: np.ndarray
    positions: np.ndarray
    gold: str
    query_class: str
    answers: dict[str, str]
    labels: list[str]
    layers: list[int]
    heads: list[int]
    values: dict[str, np.ndarray]
    answer: dict[str, Any]
    top_tokens: dict[str, np.ndarray]

    def of(self, head: Head | Sequence[int]) -> dict[str, np.ndarray]:
        """Return the values of one head, (position,) or (position, label).

        Raises
        ------
        InputError
            If the head is not in the run.
        """
        layer, number = as_head(head)
        if layer not in self.layers or number not in self.heads:
            raise InputError(f"the run has no head {layer}.{number}")
        row, column = self.layers.index(layer), self.heads.index(number)
        found = {name: array[row, column] for name, array in self.values.items()}
        if "score" in found and "score_content" in found:
            found["score_position"] = found["score"] - found["score_content"]
        return found

    @property
    def right(self) -> str:
        """The right label, or in quotes the prompt's own right answer."""
        return repr(self.answers[self.gold]) if self.answers else self.gold

    @cached_property
    def has_spans(self) -> bool:
        """Whether the user named spans of the prompt."""
        return bool((~np.isin(self.roles, ROLES)).any())

    @cached_property
    def named(self) -> np.ndarray:
        """Indices of label positions and of the user's spans."""
        return np.flatnonzero((self.roles == "label") | ~np.isin(self.roles, ROLES))

    def name_of(self, index: int) -> str:
        """Return the label that stands at one of the `named` positions, or its span and token."""
        if self.roles[index] == "label":
            return str(self.label_texts[index])
        return f"{self.roles[index]} {str(self.tokens[index])!r}"


def prompt_view(run: xr.DataTree, prompt: int) -> PromptView:
    """Return a prompt of a run.

    Parameters
    ----------
    run
        Result of `analyze` or `open`, with `qk` or `ov`.
    prompt
        Number of the prompt.

    Returns
    -------
    PromptView
        The prompt without padding, with the values of every head at its positions.

    Raises
    ------
    InputError
        If the prompt is missing, not measured yet or not finite, or the run has neither qk
        nor ov.
    """
    run = one_run(run)
    groups = [name for name in ("qk", "ov") if name in run.children]
    if not groups:
        raise InputError("the run has neither qk nor ov, so it has no values by position")
    by_position = ("prompt", "layer", "head", "position", *IN_VIEW)
    needed = {"qk": by_position, "ov": (*by_position, "label"), "predictions": ("prompt", "label")}
    for name, own in needed.items():
        if name in run.children:
            part_of(run, name, *own)
    known = prompts_of(run)
    whole("prompt", prompt)
    if prompt not in known:
        raise InputError(f"prompt {prompt} {_state(run, groups[0], prompt)}")
    if known.count(prompt) > 1:
        raise InputError(f"there are several prompts {prompt}; number them anew to see one")
    parts = {
        name: node.to_dataset(inherit=False).sel(prompt=prompt).load()
        for name, node in run.children.items()
        if name in ("prompts", "predictions", *groups)
    }
    first = parts[groups[0]].sortby(["layer", "head"])
    for name in groups:
        try:
            parts[name] = parts[name].sel(layer=first["layer"], head=first["head"])
        except KeyError as error:
            raise InputError("qk and ov do not have the same heads") from error
    place = _places(parts, first)
    n = int(place["position"].size)
    labels = [str(x) for x in parts["ov"]["label"].values] if "ov" in parts else []
    values = {}
    for name, (group, variable) in BY_POSITION.items():
        if group in parts and variable in parts[group]:
            array = parts[group][variable].transpose("layer", "head", "position", ...)
            values[name] = _spread(array, parts[group], place["position"], n)
    tops = {}
    if "top_token" in parts.get("ov", {}):
        for head in parts["ov"]["chosen"].values:
            array = parts["ov"]["top_token"].sel(chosen=head)
            tops[str(head)] = _spread(array, parts["ov"], place["position"], n)
    return PromptView(
        number=prompt,
        positions=place.pop("position"),
        **place,
        gold=str(first["gold"].item()),
        query_class=str(first["query_class"].item()),
        answers=_answers(parts),
        labels=labels,
        layers=[int(x) for x in first["layer"].values],
        heads=[int(x) for x in first["head"].values],
        values=values,
        answer=_answer(parts.get("predictions")),
        top_tokens=tops,
    )


def _state(run: xr.DataTree, group: str, prompt: int) -> str:
    """Return why a prompt has no values, in words."""
    total = run[group].sizes["prompt"]
    if prompt >= total:
        return f"is not in the run ({total} prompts)"
    if prompt in not_finite(run):
        return "is missing: its logits are not finite (load the model in float32 or bfloat16)"
    return "is not measured yet"


def not_finite(run: xr.DataTree) -> list[int]:
    """Return the numbers of the prompts whose logits are not finite."""
    found: set[int] = set()
    for node in run.children.values():
        dataset = node.to_dataset(inherit=False)
        if "finite" in dataset.coords and dataset["finite"].dims == ("prompt",):
            found |= set(dataset["prompt"].values[~finite_prompts(dataset)].tolist())
    return sorted(found)


def _places(parts: dict[str, xr.Dataset], first: xr.Dataset) -> dict[str, np.ndarray]:
    """Return tokens, roles, label_texts, classes and position of a prompt without padding."""
    known = parts.get("prompts", first)
    there = known["role"].values != "pad"
    position = _position(known)[there]
    label = known["label_text"].values[there]
    roles = known["role"].values[there]
    if "prompts" in parts:
        tokens = known["token"].values[there]
    else:  # the run has no tokens, but the labels are known
        tokens = np.where(roles == "label", label, "·")
    return {
        "position": position,
        "tokens": tokens,
        "roles": roles,
        "label_texts": label,
        "classes": known["demonstration_class"].values[there],
    }


def _position(part: xr.Dataset) -> np.ndarray:
    """Return (position,) places in the prompt; keep="labels" renumbers the coordinate."""
    name = "token_position" if "token_position" in part.coords else "position"
    found: np.ndarray = part[name].values
    return found


def _spread(array: xr.DataArray, part: xr.Dataset, position: np.ndarray, n: int) -> np.ndarray:
    """Put values at the prompt's positions; fill the others with NaN or ""."""
    axis = array.dims.index("position")
    values = np.moveaxis(array.values, axis, 0)
    there = part["role"].values != "pad"
    column = {int(p): i for i, p in enumerate(position)}
    if not set(map(int, _position(part)[there])) <= set(column):
        raise InputError("the groups of the run have different prompts")
    found = np.full(
        (n, *values.shape[1:]), np.nan if values.dtype.kind == "f" else "", values.dtype
    )
    rows = [column[int(p)] for p in _position(part)[there]]
    found[rows] = values[there]
    return np.moveaxis(found, 0, axis)


def _answers(parts: dict[str, xr.Dataset]) -> dict[str, str]:
    """Return a prompt's own answers by label, if a part has them."""
    for part in parts.values():
        if "answer_text" in part:
            texts = part["answer_text"].values
            return {str(x): str(text) for x, text in zip(part["label"].values, texts, strict=True)}
    return {}


def _answer(part: xr.Dataset | None) -> dict[str, Any]:
    if part is None:
        return {}
    return {
        "labels": [str(x) for x in part["label"].values],
        "answers": [*_answers({"predictions": part}).values()],
        "logit": part["logit"].values if "logit" in part else None,
        "logprob": part["logprob"].values,
        "margin": float(part["margin"]),
        "correct": bool(part["correct"]),
        "top_token": str(part["top_token"].item()),
    }
