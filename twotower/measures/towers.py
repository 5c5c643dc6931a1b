"""Towers: which parts of the model make a head's queries and keys similar, and feed its values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Bool, Float

from ..edits.changes import Zero
from ..errors import InputError
from ..models.rounding import Rounding
from ..prompts.positions import named, position_mask
from ..sweep.prepare_edges import prepare_reading
from ..sweep.reading import Reading
from ..sweep.reads import Changed
from ..walk.batch import Batch, columns_of
from ..walk.everywhere import Everywhere
from ..walk.proof import Claim
from ..walk.readout import Readout, get_readout
from ..walk.recorder import Recorder
from ..walk.tensors import above_mean
from ..walk.views import End, LayerView, PassingView
from .collect import collect
from .datasets import dataset
from .edges import EdgeEffects, edges_of
from .measure import MakeRecorder
from .measurement import measurement

if TYPE_CHECKING:
    import xarray as xr

    from ..edits.changes import Change
    from ..models import Model
    from ..prompts import Prompts
    from ..prompts.positions import Positions

SOURCES_AT_ONCE = 32
"""Sources whose changes are computed together, at most."""

POSITIONS_AT_ONCE = 8192
"""Positions of all prompts and sources whose keys or values are computed together, at most."""


@measurement
def towers_of(
    model: Model,
    prompts: Prompts,
    heads: Sequence[tuple[int, int]],
    sources: Any = None,
    *,
    positions: Positions = "labels",
    to: Change = Zero(),
) -> xr.Dataset:
    """Return which sources feed heads' two towers and their values.

    Each source's output is taken out of what a head's queries, keys or values read, as in
    `edge_effects`. What changes is the head's own: its QK AUC and its attention to the query's
    class, its OV AUC, and what it writes for the answer.

    Parameters
    ----------
    model, prompts
        Model and prompts to measure, with classes.
    heads
        Heads to explain.
    sources
        As in `edge_effects`; by default all.
    positions
        Positions at which keys and values read the changed stream. By default the label
        positions, whose keys and values the two towers are about.
    to
        New output of the sources, as in `edge_effects`.

    Returns
    -------
    xarray.Dataset
        (prompt, source, target, into): qk_auc_drop and class_attention_drop for "q" and "k",
        ov_auc_drop for "v", and written_drop for all three; clean minus changed. (prompt, target):
        qk_auc, class_attention, ov_auc and written in the clean run. NaN where a prompt allows no
        comparison, or the source is not below what the target reads.

    Raises
    ------
    InputError
        If the prompts have no classes, or as `edge_effects`.
    """
    if prompts.answers.by_prompt:
        raise InputError(
            "towers compare the classes of demonstrations, and these prompts have right and wrong "
            "answers of their own"
        )
    if not prompts.where("labels").any():
        raise InputError("towers need demonstrations with labels")
    edges = edges_of(model, sources, heads)
    measure = _Towers(edges, positions, "last", to)
    (arrays,) = collect(model, prompts, [measure])
    return dataset(
        "towers",
        arrays,
        model,
        prompts,
        {"positions": named(positions), **to.describe()},
        coordinates=measure.coordinates(),
        absent={("source", "target", "into"): ~edges.exist},
    )


@dataclass(frozen=True, eq=False)
class _Towers(EdgeEffects):
    """The measure behind `towers_of`."""

    group = "towers"
    scores_answers = False

    def prepare(self, model: Model, prompts: Prompts) -> MakeRecorder:
        read = prepare_reading(model, prompts, self.edges, self.positions, self.to)
        readout = get_readout(model, prompts.answers.vocabulary)
        at = position_mask(prompts, "labels")
        same = prompts.demonstration_class == prompts.query_class[:, None]
        labels = np.array(prompts.labels, dtype=object)
        rounding = Rounding.of_proof(model)

        def make(batch: Batch) -> TowersRecorder:
            columns = columns_of(batch.part(at))
            shown = np.maximum(columns, 0)
            at_once = POSITIONS_AT_ONCE // (len(batch.rows) * batch.width)
            reading = read(batch, min(SOURCES_AT_ONCE, max(1, at_once)))
            texts = np.take_along_axis(batch.part(prompts.label_text), shown, axis=1)
            found = Labels(
                batch.everywhere(shown),
                batch.everywhere(columns >= 0),
                batch.everywhere(np.take_along_axis(batch.part(same), shown, axis=1)),
                batch.everywhere((texts[..., None] == labels).astype(bool)),
            )
            return TowersRecorder(batch, reading, readout, found, rounding)

        return make


@dataclass
class Labels:
    """Label positions of a batch.

    Attributes
    ----------
    columns
        (B, N) their columns.
    there
        (B, N) boolean: False where a prompt has fewer than N.
    same
        (B, N) boolean: whether the demonstration has the query's class.
    held
        (B, N, label) boolean: whether the position holds the label.
    """

    columns: Everywhere
    there: Everywhere
    same: Everywhere
    held: Everywhere


class TowersRecorder(Recorder):
    """Records what changes in targets when sources are taken out of what they read."""

    group = "towers"

    def __init__(
        self,
        batch: Batch,
        reading: Reading,
        readout: Readout,
        labels: Labels,
        rounding: Rounding | None,
    ) -> None:
        self.reading, self.readout, self.labels = reading, readout, labels
        self.rounding = rounding
        self.gold = batch.gold
        self.claims: list[Claim] = []
        edges, width = reading.edges, batch.width
        self.donors = reading.change.donors
        # From packs, whose positions are the unchanged and then the changed ones, to prompts.
        every, prompt = reading.layout.every.own, reading.layout.prompt.own[:, 0]
        wanted = labels.columns.own + width * torch.arange(len(prompt))[:, None]
        inside = (every[prompt][:, None] == wanted[..., None]).int().argmax(dim=-1)
        columns = reading.places.columns.own[prompt]
        found = columns[:, None] == wanted[..., None]
        devices = batch.devices
        self.prompt, self.inside = Everywhere(prompt, devices), Everywhere(inside, devices)
        self.at_columns = Everywhere(found.int().argmax(dim=-1), devices)
        self.is_column = Everywhere(found.any(dim=-1), devices)
        self.shape = edges.exist.shape
        self.spread: dict[int, torch.Tensor] = {}

    def layer(self, view: LayerView) -> None:
        self.reading.keep(view)
        if view.index in self.reading.edges.layers:
            spread = self.readout.write_spread(view)
            if spread is not None:
                self.spread[view.index] = spread

    def passing(self, view: PassingView) -> None:
        self.reading.keep(view)

    def finish(self, end: End) -> dict[str, torch.Tensor]:
        edges, device = self.reading.edges, end.residual.device
        n = len(self.gold.own)
        last = self.readout.spread(end.residual)
        drops: dict[str, torch.Tensor] = {}
        clean: dict[str, torch.Tensor] = {}
        for layer in edges.layers:
            places = [i for i, target in enumerate(edges.targets) if target[0] == layer]
            for into in edges.into:
                if self.rounding is not None:
                    self.claims.append(self.reading.claim(layer, into, self.rounding))
                unchanged = self.reading.unchanged(layer, into, edges.heads_at(layer))
                found = self._values(unchanged, layer, into, last)
                for name, values in found.items():
                    whole = clean.setdefault(name, _nan(values, (n, self.shape[1]), device))
                    for i, place in enumerate(places):
                        whole[:, place] = values[:, 0, i].to(device)
        for some, layer, into, changed in self.reading.changes():
            places = [i for i, target in enumerate(edges.targets) if target[0] == layer]
            k = edges.into.index(into)
            for name, values in self._values(changed, layer, into, last).items():
                whole = drops.setdefault(f"{name}_drop", _nan(values, (n, *self.shape), device))
                before = clean[name]
                for i, place in enumerate(places):
                    for row, source in enumerate(some):
                        own = values[:, row, i].to(device)
                        whole[:, source, place, k] = before[:, place] - own
        return {**clean, **drops}

    def _values(
        self, changed: Changed, layer: int, into: str, last: Float[torch.Tensor, " B"]
    ) -> dict[str, Float[torch.Tensor, "B n h"]]:
        """Return the measures of targets, by name."""
        device = changed.scores.device
        prompt, there = self.prompt.on(device), self.labels.there.on(device)
        same = self.labels.same.on(device)
        directions = self.readout.on(device).directions[layer]
        assert directions is not None
        directions = torch.stack([directions[head] for head in changed.heads])  # (h, D, label)
        spread = last.to(device)
        if layer in self.spread:
            spread = spread * self.spread[layer].to(device)
        logits = torch.einsum("bnhd,hdl->bnhl", changed.z[prompt][:, :, -1], directions)
        found = {"written": above_mean(logits, self.gold.on(device)) / spread[:, None, None]}
        if into == "v":
            assert changed.values is not None
            own = changed.values[prompt].float()  # (B, n, M, h, D)
            index = self.at_columns.on(device)[:, None, :, None, None]
            own = own.gather(2, index.expand(-1, own.shape[1], -1, *own.shape[3:]))
            logits = torch.einsum("bnmhd,hdl->bnhml", own, directions)
            there = there & self.is_column.on(device)
            held = self.labels.held.on(device)
            n_labels = held.shape[-1]
            others = (logits.sum(dim=-1, keepdim=True) - logits) / max(n_labels - 1, 1)
            each = [
                _auc((logits - others)[..., i], held[..., i] & there, ~held[..., i] & there)
                for i in range(n_labels)
            ]
            found["ov_auc"] = torch.stack(each).nanmean(dim=0)
            return found
        index = self.inside.on(device)[:, None, None].expand(-1, *changed.scores.shape[1:3], -1)
        scores = changed.scores[prompt][:, :, :, -1].gather(-1, index)
        weights = changed.weights[prompt][:, :, :, -1].gather(-1, index)
        found["qk_auc"] = _auc(scores, same & there, ~same & there)
        found["class_attention"] = (weights * (same & there)[:, None, None]).sum(dim=-1)
        return found


def _nan(like: torch.Tensor, shape: tuple[int, ...], device: torch.device) -> torch.Tensor:
    return torch.full(shape, torch.nan, dtype=like.dtype, device=device)


def _auc(
    values: Float[torch.Tensor, "B n h N"],
    high: Bool[torch.Tensor, "B N"],
    low: Bool[torch.Tensor, "B N"],
) -> Float[torch.Tensor, "B n h"]:
    """Return the probability that a value of `high` exceeds one of `low`; NaN without a pair."""
    first, second = values.unsqueeze(-1), values.unsqueeze(-2)
    wins = (first > second).float() + 0.5 * (first == second)
    pairs = (high.unsqueeze(-1) & low.unsqueeze(-2))[:, None, None]
    found: torch.Tensor = (wins * pairs).sum(dim=(-1, -2)) / pairs.sum(dim=(-1, -2))
    return found
