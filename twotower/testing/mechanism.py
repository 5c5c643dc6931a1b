"""The two-tower mechanism, as queries, keys, values and outputs of single heads.

A prompt is "text: label" line by line, and "text:" at its end; all of these are one token each.

- All heads have the same keys and values. A key tells the feature that was gathered at the
  position, whether it is a label, whether it is a text, and where it is; a value holds the
  label and the feature of the token itself.
- The *gathering* head looks one or two positions back at a text and writes its feature: at the
  label of each demonstration, and at the last position.
- A *matching* head compares the feature gathered at the last position with those at the labels
  (its queries and keys are two towers), and writes the labels that it finds.
- Distractors: *silent* heads match and write nothing; *loud* heads look at all labels alike and
  write them; *recent* heads look at the nearest labels and write them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from .coordinates import Coordinates

NEAR = 1.5
"""Distance at which a gathering head looks: between 1 (from ":") and 2 (from a label)."""

GATHER = 12.0
"""Scores by which the nearest text stands out, by frequency."""

ON_LABELS = 16.0
"""Score by which labels stand out from other positions."""

RECENT = 0.5
"""Slope of a recent distractor's scores, by token."""


@dataclass(frozen=True)
class Slots:
    """Where in a head each part of queries and keys goes.

    Attributes
    ----------
    content
        Elements that no rotation reaches, or a slow one: one by class, and one more.
    near
        Pairs of elements, and the frequency by which they are turned.
    slow
        One such pair of a low frequency, for nearness.
    text
        Where positions are learned: an element for whether the key is a text, and one for
        its place. None with rotary.
    """

    content: list[int]
    near: list[tuple[int, int, float]]
    slow: tuple[int, int, float] | None = None
    text: tuple[int, int] | None = None


@dataclass(frozen=True)
class Mechanism:
    """What the heads of a planted model compute.

    Attributes
    ----------
    x
        The residual stream's directions.
    slots
        Where queries and keys have their parts.
    n_classes, d_head
        Classes (and labels), and width of a head.
    similarity
        Score by which a label of the query's class stands out from the others.
    recency
        What the score of a matching head loses by token of distance.
    """

    x: Coordinates
    slots: Slots
    n_classes: int
    d_head: int
    similarity: float
    recency: float

    def keys(self) -> torch.Tensor:
        """(d_head, d_model) of all heads."""
        weight = torch.zeros(self.d_head, self.x.d_model)
        for c in range(self.n_classes):
            weight[self.slots.content[c]] = self.x[f"gathered {c}"]
        weight[self.slots.content[self.n_classes]] = self.x["label"]
        for f, (a, b, _) in enumerate(self.slots.near):
            if self.slots.text is None:
                weight[a] = self.x["text"]
            else:
                weight[a], weight[b] = self.x[f"cos {f}"], self.x[f"sin {f}"]
        if self.slots.slow is not None:
            weight[self.slots.slow[0]] = self.x["label"]
        if self.slots.text is not None:
            text, place = self.slots.text
            weight[text], weight[place] = self.x["text"], self.x["place"]
        return weight

    def values(self) -> torch.Tensor:
        """(d_head, d_model) of all heads: the token's label, then its feature."""
        rows = [
            self.x[f"{what} {c}"] for what in ("label", "feature") for c in range(self.n_classes)
        ]
        weight = torch.zeros(self.d_head, self.x.d_model)
        weight[: len(rows)] = torch.stack(rows)
        return weight

    def gathering_queries(self) -> torch.Tensor:
        """(d_head, d_model): the nearest text before labels and ends."""
        weight = torch.zeros(self.d_head, self.x.d_model)
        for f, (a, b, theta) in enumerate(self.slots.near):
            cos, sin = (GATHER * wave(theta * NEAR) for wave in (math.cos, math.sin))
            if self.slots.text is None:
                weight[a], weight[b] = cos * self.x["asks"], -sin * self.x["asks"]
            else:
                c, s = self.x[f"cos {f}"], self.x[f"sin {f}"]
                weight[a], weight[b] = cos * c + sin * s, cos * s - sin * c
        if self.slots.text is not None:
            weight[self.slots.text[0]] = 2 * GATHER * self.x["constant"] / self._constant
        return self._scaled(weight)

    def looking_queries(self, similarity: float, recency: float) -> torch.Tensor:
        """(d_head, d_model): labels, the more the more like the query, and the nearer."""
        weight = torch.zeros(self.d_head, self.x.d_model)
        for c in range(self.n_classes):
            weight[self.slots.content[c]] = similarity * self.x[f"gathered {c}"]
        one = self.x["constant"] / self._constant
        weight[self.slots.content[self.n_classes]] = ON_LABELS * one
        if self.slots.slow is not None:
            _, b, theta = self.slots.slow
            weight[b] = recency / theta * one
        if self.slots.text is not None:
            weight[self.slots.text[1]] = recency * PLACES * one
        return self._scaled(weight)

    def matching_queries(self) -> torch.Tensor:
        """(d_head, d_model) of a matching head."""
        return self.looking_queries(self.similarity, self.recency)

    def gathering_outputs(self) -> torch.Tensor:
        """(d_model, d_head): the text's feature becomes the gathered one."""
        return self._outputs(self.n_classes, "gathered", 1.0)

    def label_outputs(self, gain: float) -> torch.Tensor:
        """(d_model, d_head): the label becomes the answer."""
        return self._outputs(0, "answer", gain)

    @property
    def _constant(self) -> float:
        """Length of the constant."""
        return math.sqrt(self.x.d_model)

    def _scaled(self, weight: torch.Tensor) -> torch.Tensor:
        return weight * math.sqrt(self.d_head)  # attention divides by it

    def _outputs(self, first: int, what: str, gain: float) -> torch.Tensor:
        weight = torch.zeros(self.x.d_model, self.d_head)
        for c in range(self.n_classes):
            weight[:, first + c] = gain * self.x[f"{what} {c}"]
        return weight


PLACES = 64.0
"""Positions over which the direction "place" grows by its unit."""
