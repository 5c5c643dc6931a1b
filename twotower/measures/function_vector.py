"""Function vectors: mean outputs of heads that carry a task into prompts without demonstrations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..checks import several
from ..edits.edits import Add
from ..errors import InputError
from ..head import Head, as_list, check_heads
from ..models.architecture import call
from ..prompts.positions import named
from ..results.missing import blank
from ..walk.not_finite import FINITE
from ..walk.readout import Readout
from ..walk.readouts import Readouts
from ..walk.recorder import Recorder
from ..walk.views import End, LayerView
from .collect import collect
from .datasets import dataset
from .measure import MakeRecorder, Measure
from .measurement import measurement
from .predictions import Predictions

if TYPE_CHECKING:
    import xarray as xr

    from ..models import Model
    from ..prompts import Prompts
    from ..prompts.positions import Positions


@measurement
def function_vector(model: Model, prompts: Prompts, heads: Sequence[tuple[int, int]]) -> xr.Dataset:
    """Return the sum of heads' mean outputs at the last position.

    Parameters
    ----------
    model, prompts
        Model and prompts with demonstrations to average over.
    heads
        Heads, such as those with the largest `function_vector` of `head_kinds`.

    Returns
    -------
    xarray.Dataset
        vector (feature); head_vector (chosen, feature), where `chosen` names heads as
        "layer.head". Add it to prompts without demonstrations: ``Add(found, layer)``.

    Raises
    ------
    InputError
        If there are no heads, or one is out of range.

    References
    ----------
    Todd et al. (2024), "Function vectors in large language models", arXiv:2310.15213.
    """
    checked = check_heads(heads, model)
    if not checked:
        raise InputError("a function vector needs at least one head")
    measure = _HeadOutputs(tuple(as_list(checked)))
    (found,) = collect(model, prompts, [measure])
    outputs = found["head_vector"][found[FINITE]].mean(axis=0, dtype=np.float64)
    arrays = {
        "vector": outputs.sum(axis=0).astype(np.float32),
        "head_vector": outputs.astype(np.float32),
    }
    settings = measure.settings()
    return dataset(
        "function_vector", arrays, model, prompts, settings, coordinates=measure.coordinates()
    )


@dataclass(frozen=True, eq=False)
class _HeadOutputs(Measure):
    """What each chosen head adds to the residual stream at the last position."""

    group = "function_vector"
    heads: tuple[tuple[int, int], ...]

    def prepare(self, model: Model, prompts: Prompts) -> MakeRecorder:
        readout = Readouts(model, prompts).any_labels
        return lambda batch: HeadOutputsRecorder(self.heads, readout)

    def settings(self) -> dict[str, Any]:
        return {"heads": [[int(x) for x in head] for head in self.heads]}

    def coordinates(self) -> Mapping[str, Any]:
        return {"chosen": [str(Head(*head)) for head in self.heads]}


class HeadOutputsRecorder(Recorder):
    """Records what each chosen head adds to the residual stream at the last position."""

    group = "function_vector"

    def __init__(self, heads: Sequence[tuple[int, int]], readout: Readout) -> None:
        self.heads, self.weights = heads, readout
        self.found: dict[tuple[int, int], torch.Tensor] = {}

    def layer(self, view: LayerView) -> None:
        own = [head for layer, head in self.heads if layer == view.index]
        if not own:
            return
        projection = view.architecture.projection(view.block)
        nothing = call(projection, torch.zeros_like(view.z[:1, -1:]).flatten(-2))
        for head in own:
            alone = torch.zeros_like(view.z[:, -1:])
            alone[:, :, head] = view.z[:, -1:, head]
            output = call(projection, alone.flatten(-2)) - nothing
            self.found[view.index, head] = self.weights.write(view, output)[:, 0]

    def finish(self, end: End) -> dict[str, torch.Tensor]:
        device = end.residual.device
        vectors = [self.found[layer, head].to(device) for layer, head in self.heads]
        return {"head_vector": torch.stack(vectors, dim=1).float()}


@measurement
def vector_effects(
    model: Model,
    prompts: Prompts,
    vector: Any,
    layers: Sequence[int] | None = None,
    positions: Positions = "last",
) -> xr.Dataset:
    """Return the model's answers with a vector added to the residual stream, for every layer.

    Parameters
    ----------
    model, prompts
        Model and prompts to measure, such as prompts without demonstrations.
    vector
        (d_model,) numbers, or the result of `function_vector`.
    layers
        Layers that the changed stream enters, one at a time; by default all.
    positions
        Positions at which the vector is added, as in `Add`.

    Returns
    -------
    xarray.Dataset
        logprob_gain, margin, correct, top1_correct (prompt, layer).

    Raises
    ------
    InputError
        As `Add`, or if there are no layers.
    """
    asked = list(range(model.n_layers)) if layers is None else several("layers", layers)
    if not asked:
        raise InputError("there are no layers to add the vector to")
    edits = [Add(vector, layer, positions) for layer in asked]
    (clean,) = collect(model, prompts, [Predictions()])
    right = (np.arange(len(prompts)), prompts.gold_index)
    finite = clean[FINITE]
    columns: dict[str, list[np.ndarray]] = {"logprob_gain": []}
    for edit in edits:
        (found,) = collect(model, prompts, [Predictions()], edits=[edit])
        finite = finite & found[FINITE]
        columns["logprob_gain"].append((found["logprob"] - clean["logprob"])[right])
        for name in ("margin", "correct", "top1_correct"):
            columns.setdefault(name, []).append(found[name])
    arrays = {name: np.stack(values, axis=1) for name, values in columns.items()}
    arrays = {name: blank(values, finite) for name, values in arrays.items()}
    settings = {"vector": edits[0].describe()["vector"], "positions": named(positions)}
    return dataset(
        "vector_effects",
        {**arrays, FINITE: finite},
        model,
        prompts,
        settings,
        coordinates={"layer": asked},
    )
