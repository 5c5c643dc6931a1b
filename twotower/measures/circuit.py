"""Circuits: from the answer backwards, the edges that matter, by their exact effects."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..checks import fraction, whole, yes_or_no
from ..edits.changes import Change, Zero, check_change
from ..edits.cut import ANSWER
from ..edits.sources import parse_source
from ..errors import InputError
from ..head import Head, parse_head
from ..prompts.positions import named
from ..results import measured_prompts
from ..statistics import Estimate, bootstrap_mean, mean_known
from ..walk.once import once
from .attribution import attribution
from .choose import above_others
from .datasets import dataset
from .edges import edge_effects
from .measurement import measurement
from .predict import predict

if TYPE_CHECKING:
    import xarray as xr

    from ..models import Model
    from ..prompts import Prompts
    from ..prompts.positions import Positions

DRAWS = 1000
"""Random sets of edges that the control draws."""


@dataclass(frozen=True, eq=False)
class _Edge:
    """An edge with its effects (prompt,), and where source and target act."""

    source: str
    source_at: str
    target: str
    target_at: str
    tower: str
    effects: np.ndarray

    @once
    def strength(self) -> float:
        """Absolute mean effect."""
        return float(abs(mean_known(self.effects)))


@dataclass(frozen=True)
class _Found:
    """An edge of the circuit, with its interval and what random edges reach."""

    edge: _Edge
    estimate: Estimate
    chance: float


@measurement
def circuit(
    model: Model,
    prompts: Prompts,
    *,
    writers: int = 8,
    edges: int = 60,
    threshold: float = 0.02,
    depth: int = 3,
    positions: Positions | None = None,
    before_last: bool = False,
    to: Change = Zero(),
    seed: int = 0,
) -> xr.Dataset:
    """Return the circuit behind an answer: the heads that write it and what feeds them.

    The search starts at the answer. The heads that write most for or against it are its first
    sources. Then the exact effects of all edges into the queries, keys and values of these heads
    are measured (`edge_effects`); the strongest edges join the circuit, their sources are searched
    in turn, and so on.

    Parameters
    ----------
    model, prompts
        Model and prompts to explain.
    writers
        Largest number of heads that write the answer.
    edges
        Largest number of edges, those into the answer included.
    threshold
        Smallest absolute mean effect of an edge, as a share of the clean margin. An edge's 95%
        interval over prompts must also leave out 0.
    depth
        Number of times that sources are searched for their own sources.
    positions
        Positions at which the first heads' keys and values read a changed stream; by default the
        label positions, or all without labels.
    before_last
        Whether to search also for what feeds heads at the positions of keys and values. Their
        outputs change whole sequences there, so that each edge costs up to a forward; otherwise
        they are the circuit's ends, and only heads at the last position are searched.
    to
        New output of sources, as in `head_effects`.
    seed
        Seed of the intervals and of the control.

    Returns
    -------
    xarray.Dataset
        effect (prompt, edge), and of each edge source_name, target_name, the tower into which it
        leads ("q", "k", "v" or "answer"), source_at and target_at (the positions at which they
        act), mean_effect, low and high (95% interval). chance (edge): 95% of equally many edges,
        drawn at random among those measured in the same step, have a smaller mean absolute effect.

    Raises
    ------
    InputError
        If the model does not answer the prompts (its mean margin is not above 0), or as
        `edge_effects`.

    Notes
    -----
    The effect of an edge into the answer is what the head writes for it: the right answer's logit
    less the mean of the others', with the final norm's statistic frozen. That of other edges is
    the drop of the margin. `faithfulness` measures how much of the margin a circuit keeps.
    """
    yes_or_no("before_last", before_last)
    for name, number, least in (("writers", writers, 1), ("edges", edges, 1), ("depth", depth, 0)):
        whole(name, number, least)
    fraction("threshold", threshold)
    whole("seed", seed)
    check_change(to)
    margin = mean_known(measured_prompts(predict(model, prompts))["margin"].values)
    if not margin > 0:
        raise InputError(
            f"the model does not answer these prompts: its mean margin is {float(margin):.3g}, and "
            "a circuit explains a margin above 0"
        )
    if positions is None:
        positions = "labels" if prompts.where("labels").any() else "all"
    search = _Search(model, prompts, float(margin) * threshold, edges, seed)
    search.answer(min(writers, edges))
    seen: set[tuple[str, str]] = set()
    for _ in range(depth):
        frontier = {
            (found.edge.source, found.edge.source_at)
            for found in search.found
            if _is_head(found.edge.source) and (before_last or found.edge.source_at == "last")
        } - seen
        if not frontier or len(search.found) >= edges:
            break
        search.step(frontier, positions, to)
        seen |= frontier
    settings = {
        "writers": writers,
        "edges": edges,
        "threshold": threshold,
        "depth": depth,
        "positions": named(positions),
        "before_last": before_last,
        "seed": seed,
        "margin": float(margin),
        **to.describe(),
    }
    return _dataset(search, model, prompts, settings)


class _Search:
    """The edges found so far.

    Parameters
    ----------
    model, prompts
        Model and prompts to explain.
    least
        Smallest absolute mean effect.
    budget
        Largest number of edges.
    seed
        Seed of the intervals and of the control.
    """

    def __init__(
        self, model: Model, prompts: Prompts, least: float, budget: int, seed: int
    ) -> None:
        self.model, self.prompts, self.least = model, prompts, least
        self.budget, self.seed = budget, seed
        self.found: list[_Found] = []
        self.places: dict[str, Positions] = {"last": "last", "all": "all"}

    def answer(self, writers: int) -> None:
        """Find the heads that write for or against the answer."""
        written = above_others(attribution(self.model, self.prompts)["label_logit"])
        candidates = [
            _Edge(str(h), "last", ANSWER, "last", ANSWER, written.sel(layer=h[0], head=h[1]).values)
            for h in self.model.heads
        ]
        self._accept(candidates, writers)
        if not self.found:
            raise InputError(
                "no head writes the answer above the threshold; take a smaller one, or more prompts"
            )

    def step(self, nodes: set[tuple[str, str]], positions: Positions, to: Change) -> None:
        """Find the edges into some heads, each with the positions at which it acts."""
        candidates: list[_Edge] = []
        where = positions if isinstance(positions, str) else "positions"
        self.places[where] = positions
        for at in sorted({own for _, own in nodes}):
            heads = sorted(parse_head(name) for name, own in nodes if own == at)
            keys = where if at == "last" else "all"
            found = edge_effects(
                self.model,
                self.prompts,
                None,
                heads,
                positions=self.places[keys],
                outputs=self.places[at],
                to=to,
            )
            candidates += list(_edges(found["margin_drop"], at, keys))
        self._accept(candidates, self.budget - len(self.found))

    def _accept(self, candidates: list[_Edge], n: int) -> None:
        strong = [edge for edge in candidates if edge.strength >= self.least]
        strong.sort(key=lambda edge: -edge.strength)
        chosen: list[tuple[_Edge, Estimate]] = []
        for edge in strong:
            if len(chosen) == n:
                break
            estimate = bootstrap_mean(edge.effects, self.seed)
            if estimate.positive or estimate.negative:
                chosen.append((edge, estimate))
        sizes = np.array([edge.strength for edge in candidates])
        chance = _chance(sizes, len(chosen), self.seed)
        self.found += [_Found(edge, estimate, chance) for edge, estimate in chosen]


def _edges(effects: xr.DataArray, at: str, where: str) -> Iterator[_Edge]:
    """Yield the edges of a measurement that exist."""
    values = effects.transpose("prompt", "source", "target", "into").values
    for i, source in enumerate(effects["source"].values):
        for j, target in enumerate(effects["target"].values):
            for k, into in enumerate(effects["into"].values):
                if not np.isnan(values[:, i, j, k]).all():
                    source_at = at if into == "q" else where
                    edge = (str(source), source_at, str(target), at, str(into))
                    yield _Edge(*edge, values[:, i, j, k])


def _chance(sizes: np.ndarray, n: int, seed: int) -> float:
    """Return the mean that 95% of random sets of n sizes do not reach."""
    if not n:
        return float("nan")
    rng = np.random.default_rng([seed, 21])
    drawn = [sizes[rng.permutation(len(sizes))[:n]].mean() for _ in range(DRAWS)]
    return float(np.quantile(drawn, 0.95))


def _is_head(name: str) -> bool:
    return parse_source(name).kind == "head"


def _dataset(
    search: _Search, model: Model, prompts: Prompts, settings: dict[str, Any]
) -> xr.Dataset:
    found = [found.edge for found in search.found]
    estimates = [found.estimate for found in search.found]
    arrays: dict[str, np.ndarray] = {
        "effect": np.stack([edge.effects for edge in found], axis=1).astype(np.float32),
        "mean_effect": np.array([estimate.value for estimate in estimates]),
        "low": np.array([estimate.low for estimate in estimates]),
        "high": np.array([estimate.high for estimate in estimates]),
        "chance": np.array([found.chance for found in search.found]),
    }
    for name in ("source", "source_at", "target", "target_at", "tower"):
        texts = np.array([getattr(edge, name) for edge in found], dtype=object)
        # A variable may not have the name of a dim.
        arrays[f"{name}_name" if name in ("source", "target") else name] = texts
    arrays["finite"] = np.isfinite(arrays["effect"]).all(axis=1)
    coordinates = {"edge": np.arange(len(found))}
    return dataset("circuit", arrays, model, prompts, settings, coordinates=coordinates)


def circuit_heads(found: xr.Dataset) -> list[Head]:
    """Return a circuit's heads, strongest first.

    Parameters
    ----------
    found
        Result of `circuit`.

    Returns
    -------
    list of Head
        Ordered by the largest absolute mean effect of an edge that leaves the head.

    Raises
    ------
    InputError
        If the dataset is not a circuit.
    """
    if not hasattr(found, "data_vars") or "source_name" not in found:
        raise InputError("this is not the result of circuit")
    strength: dict[str, float] = {}
    sources, means = found["source_name"].values, found["mean_effect"].values
    for name, mean in zip(sources, means, strict=True):
        if _is_head(str(name)):
            strength[str(name)] = max(strength.get(str(name), 0.0), abs(float(mean)))
    return [parse_head(name) for name in sorted(strength, key=lambda name: -strength[name])]
