"""Which counterfactual runs there are, and what of them can be shared.

A counterfactual is a group of heads that are changed together. Below the group's highest
layer it is the same run as that of its lower heads alone, so all groups make a *tree*: a
run branches off its parent's at the layer of its highest heads. Single heads branch off
the clean run. `plan` says, layer by layer, which runs go on and which branch off.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby

Group = tuple[tuple[int, int], ...]
"""Heads (layer, head) that are changed together."""

UNCHANGED: Group = ((-1, -1),)
"""Stands for a run in which nothing is changed, which must stay on the clean run."""


@dataclass
class Step:
    """What happens to the runs at one layer.

    Attributes
    ----------
    n_before
        Number of runs that come from below.
    kept
        Which of them go on, in their order; the others only serve as parents.
    parents
        For each run that branches off here: its parent among those from below, or -1 for
        the clean run. It stands after those kept.
    heads
        For each run that branches off: the heads changed at this layer.
    """

    n_before: int = 0
    kept: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    heads: list[tuple[int, ...]] = field(default_factory=list)


@dataclass
class Plan:
    """How the counterfactuals of some groups of heads are run.

    Attributes
    ----------
    steps
        One for each layer.
    order
        For each group: number of its run among those that leave the last layer.
    unchanged
        For each layer: number of the unchanged run among those that leave it; None where
        there is none yet.
    """

    steps: list[Step]
    order: list[int]
    unchanged: list[int | None]

    @property
    def row_layers(self) -> int:
        """Blocks that rows go through, whole or from their attention's output on."""
        return sum(step.n_before + len(step.parents) for step in self.steps)


def plan(groups: Sequence[Group], n_layers: int, unchanged: int | None = None) -> Plan:
    """How to run the counterfactuals of some groups of heads, sharing what is common.

    Parameters
    ----------
    groups
        Groups of one head or more, no two alike.
    n_layers
        Number of blocks.
    unchanged
        The layer from which a run goes along in which nothing is changed; None for no such run.
    """
    # A run is known by its changes so far; `until` is the last layer it is needed at.
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
