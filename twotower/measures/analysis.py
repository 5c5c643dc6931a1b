"""All measures of one set of prompts, from one forward per batch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import InputError
from ..results import make_tree, provenance
from .collect import Arrays, collect, dataset
from .measure import measure
from .recorders import Predictions
from .scores import two_tower_scores
from .sweep_maker import sweep_maker
from .towers import attribution_maker, check_norm, similarity_maker, values_maker

if TYPE_CHECKING:
    import xarray as xr

    from ..models import Model
    from ..prompts import Prompts

MEASURES = ("predictions", "effects", "attribution", "qk", "ov")


@measure
def analyze(
    model: Model,
    prompts: Prompts,
    *,
    measures: Sequence[str] = MEASURES,
    norm: str = "frozen",
    logprobs: bool = True,
    keep: str = "all",
    batch_size: int | None = None,
    progress: bool | str = False,
) -> xr.DataTree:
    """Predictions, effects at the last position, attribution, QK and OV of every head.

    Parameters
    ----------
    model, prompts
        What is measured.
    measures
        Which of "predictions", "effects", "attribution", "qk", "ov".
    norm
        See `attribution`.
    logprobs
        See `head_effects`.
    keep
        "all" positions of QK and OV, or "labels".
    batch_size
        Prompts in a batch; fewer where memory runs out. By default about a thousand
        tokens' worth on a processor, and as many as fill a GPU, which is found out and
        remembered.
    progress
        Show a bar; a text is its title.

    Returns
    -------
    xarray.DataTree
        A run: a group for each measure, `prompts`, and `scores` where they can be made.

    Raises
    ------
    InputError
        If a measure is not known.
    """
    settings = Settings(measures, norm, logprobs, keep)
    found = measured(model, prompts, settings, batch_size=batch_size, progress=progress)
    groups, about = datasets(model, prompts, settings, found)
    run = make_tree(groups, about)
    if {"qk", "ov"} <= set(groups):
        groups["scores"] = two_tower_scores(run)
        run = make_tree(groups, about)
    return run


@dataclass(frozen=True)
class Settings:
    """What `analyze` measures; see there."""

    measures: Sequence[str] = MEASURES
    norm: str = "frozen"
    logprobs: bool = True
    keep: str = "all"

    def __post_init__(self) -> None:
        measures = self.measures
        listed = isinstance(measures, Iterable) and not isinstance(measures, str)
        measures = list(measures) if listed else measures
        if not listed or not measures or any(name not in MEASURES for name in measures):
            raise InputError(f"measures={measures!r}: choose a list from {', '.join(MEASURES)}")
        object.__setattr__(self, "measures", tuple(dict.fromkeys(measures)))
        check_norm(self.norm)

    def of(self, group: str) -> dict[str, Any]:
        """The settings that a group's dataset tells."""
        told: dict[str, dict[str, Any]] = {
            "effects": {"positions": "last", "ablation": "zero"},
            "attribution": {"norm": self.norm},
            "qk": {"keep": self.keep},
            "ov": {"keep": self.keep},
        }
        return told.get(group, {})


@measure
def measured(
    model: Model,
    prompts: Prompts,
    settings: Settings,
    *,
    batch_size: int | None = None,
    progress: bool | str = False,
) -> dict[str, Arrays]:
    """Arrays of every measure by group, over all prompts in their order."""
    makers: dict[str, Any] = {}
    for name in settings.measures:
        if name == "predictions":
            makers[name] = lambda batch: Predictions(batch, prompts.label_ids)
        elif name == "effects":
            makers[name] = sweep_maker(model, prompts, logprobs=settings.logprobs)
        elif name == "attribution":
            makers[name] = attribution_maker(model, prompts, settings.norm)
        elif name == "qk":
            makers[name] = similarity_maker(prompts)
        else:
            makers[name] = values_maker(model, prompts)
    found = collect(
        model,
        prompts,
        list(makers.values()),
        batch_size=batch_size,
        keep=settings.keep,
        kind=("analyze", settings),
        progress=progress,
    )
    return dict(zip(makers, found, strict=True))


def datasets(
    model: Model, prompts: Prompts, settings: Settings, found: Mapping[str, Arrays]
) -> tuple[dict[str, xr.Dataset], dict[str, Any]]:
    """A run's groups from the arrays of its measures, and the attributes of its root."""
    groups = {
        name: dataset(name, arrays, model, prompts, **settings.of(name))
        for name, arrays in found.items()
    }
    missing = max(group.attrs["not_finite"] for group in groups.values())
    texts = prompts_dataset(model, prompts).assign_attrs(not_finite=missing)
    about = {**provenance(model, prompts, measures=list(found)), "not_finite": missing}
    return {"prompts": texts, **groups}, about


def prompts_dataset(model: Model, prompts: Prompts) -> xr.Dataset:
    """The prompts themselves, token by token."""
    arrays = {
        "token_id": prompts.token_id,
        "token": prompts.token,
        "text": np.array([p.text for p in prompts], dtype=object),
    }
    return dataset("prompts", arrays, model, prompts)
