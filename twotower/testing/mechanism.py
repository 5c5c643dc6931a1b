"""The two-tower mechanism, as queries, keys, values and outputs of single heads.

A prompt is "text: label" on each line, and "text:" at its end; each of these is one token.

- All heads have the same keys and values. A key encodes the feature gathered at the position,
  whether it is a label, whether it is a text, and where it is. A value encodes the label and
  the feature of the token itself.
- The *gathering* head looks one or two positions back at a text and writes its feature, at the
  label of each demonstration and at the last position.
- A *matching* head compares the feature gathered at the last position with those at the labels
  (its queries and keys are two towers), and writes the labels of matching positions.
- Distractors: *silent* heads match and write nothing; *loud* heads attend to all labels equally
  and write them; *recent* heads attend to the nearest labels and write them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from .coordinates import Coordinates

NEAR = 1.5
"""Distance at which a gathering head looks: between 1 (from ":") and 2 (from a label)."""

GATHER = 12.0
"""Score advantage of the nearest text, per frequency."""

ON_LABELS = 16.0
"""Score advantage of labels over other positions."""

RECENT = 0.5
"""Slope of a recent distractor's scores, per token."""


@dataclass(frozen=True)
class Slots:
    """Elements of a head that hold each part of queries and keys.

    Attributes
    ----------
    content
        Elements with slow or no rotation: one per class, and one more.
    near
        Pairs of elements, with the frequency of their rotation.
    slow
        One such pair of low frequency, for recency.
    text
        For learned positions: an element for whether the key is a text, and one for its
        position. None with rotary.
    spare
        An element that holds nothing, for a ballast. None where no norm needs one.
    """

    content: list[int]
    near: list[tuple[int, int, float]]
    slow: tuple[int, int, float] | None = None
    text: tuple[int, int] | None = None
    spare: int | None = None


@dataclass(frozen=True)
class Mechanism:
    """Queries, keys, values and outputs of a planted model's heads.

    Attributes
    ----------
    x
        Directions of the residual stream.
    slots
        Elements for the parts of queries and keys.
    n_classes, d_head
        Number of classes (and labels), and width of a head.
    similarity
        Score advantage of labels of the query's class.
    recency
        Decrease of a matching head's score per token of distance.
    """

    x: Coordinates
    slots: Slots
    n_classes: int
    d_head: int
    similarity: float
    recency: float

    def keys(self) -> torch.Tensor:
        """(d_head, d_model) keys of all heads."""
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
        """(d_head, d_model) values of all heads: the token's label, then its feature."""
        rows = [
            self.x[f"{what} {c}"] for what in ("label", "feature") for c in range(self.n_classes)
        ]
        weight = torch.zeros(self.d_head, self.x.d_model)
        weight[: len(rows)] = torch.stack(rows)
        return weight

    def gathering_queries(self) -> torch.Tensor:
        """(d_head, d_model) queries, at labels and last positions, for the nearest text."""
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
        """(d_head, d_model) queries for labels, more for similar and for near ones."""
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
        """(d_head, d_model) queries of a matching head."""
        return self.looking_queries(self.similarity, self.recency)

    def gathering_outputs(self) -> torch.Tensor:
        """(d_model, d_head) outputs that turn the text's feature into the gathered one."""
        return self._outputs(self.n_classes, "gathered", 1.0)

    def label_outputs(self, gain: float) -> torch.Tensor:
        """(d_model, d_head) outputs that turn the label into the answer."""
        return self._outputs(0, "answer", gain)

    @property
    def _constant(self) -> float:
        """Length of the constant vector."""
        return math.sqrt(self.x.d_model)

    def _scaled(self, weight: torch.Tensor) -> torch.Tensor:
        return weight * math.sqrt(self.d_head)  # attention divides by it

    def _outputs(self, first: int, what: str, gain: float) -> torch.Tensor:
        weight = torch.zeros(self.x.d_model, self.d_head)
        for c in range(self.n_classes):
            weight[:, first + c] = gain * self.x[f"{what} {c}"]
        return weight


PLACES = 64.0
"""Number of positions over which the direction "place" grows by 1."""
