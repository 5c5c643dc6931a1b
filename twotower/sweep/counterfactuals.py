"""Plan of the counterfactual runs of a sweep, with shared computation.

In a counterfactual run, a group of heads is changed together. Below the group's highest layer,
the run equals that of the group without its heads in that layer. So the runs form a *tree*: each
run branches off its parent at the layer of its highest heads. Single heads branch off the clean
run. `plan` lists for each layer which runs continue and which branch off.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby

Group = tuple[tuple[int, int], ...]
"""Heads (layer, head) to change together."""

UNCHANGED: Group = ((-1, -1),)
"""Key of the run in which nothing is changed; it must equal the clean run."""


@dataclass
class Step:
    """Runs that continue and branch off at one layer.

    The runs that leave the layer are those kept, followed by those that branch off.

    Attributes
    ----------
    n_before
        Number of runs that enter the layer.
    kept
        Indices of the entering runs that continue; the others only serve as parents.
    parents
        For each run that branches off: index of its parent among the entering runs, or -1 for
        the clean run.
    heads
        For each run that branches off: the heads changed at this layer.
    """

    n_before: int = 0
    kept: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    heads: list[tuple[int, ...]] = field(default_factory=list)


@dataclass
class Plan:
    """Plan of the counterfactual runs of some groups of heads.

    Attributes
    ----------
    steps
        One step for each layer.
    order
        For each group: index of its run among those that leave the last layer.
    unchanged
        For each layer: index of the unchanged run among those that leave it; None before the
        unchanged run starts.
    """

    steps: list[Step]
    order: list[int]
    unchanged: list[int | None]

    @property
    def row_layers(self) -> int:
        """Number of blocks computed, summed over rows; a block where a row starts counts too."""
        return sum(step.n_before + len(step.parents) for step in self.steps)


def plan(groups: Sequence[Group], n_layers: int, unchanged: int | None = None) -> Plan:
    """Return a plan of the counterfactual runs of some groups of heads.

    Parameters
    ----------
    groups
        Distinct groups of one head or more.
    n_layers
        Number of blocks.
    unchanged
        Layer at which the unchanged run starts; None for no unchanged run.
    """
    # The key of a run is its changes so far; `until` is the last layer that needs the run.
    until: dict[Group, int] = {}
    here: list[dict[Group, tuple[Group, tuple[int, ...]]]] = [{} for _ in range(n_layers)]
    wanted = []
    if unchanged is not None:
        until[UNCHANGED] = n_layers
        here[unchanged][UNCHANGED] = ((), ())
    for group in groups:
        parent: Group = ()
        for layer, heads in groupby(sorted(group), key=lambda head: head[0]):
            numbers = tuple(head for _, head in heads)
            run = (*parent, *((layer, number) for number in numbers))
            if parent:
                until[parent] = max(until[parent], layer)
            until.setdefault(run, layer)
            here[layer][run] = (parent, numbers)
            parent = run
        until[parent] = n_layers
        wanted.append(parent)
    runs: list[Group] = []
    steps, at = [], []
    for layer, joining in enumerate(here):
        place = {run: i for i, run in enumerate(runs)}
        kept = [i for i, run in enumerate(runs) if until[run] > layer]
        steps.append(
            Step(
                len(runs),
                kept,
                [place[parent] if parent else -1 for parent, _ in joining.values()],
                [heads for _, heads in joining.values()],
            )
        )
        runs = [runs[i] for i in kept] + list(joining)
        at.append(runs.index(UNCHANGED) if UNCHANGED in runs else None)
    place = {run: i for i, run in enumerate(runs)}
    return Plan(steps, [place[run] for run in wanted], at)
