"""The residual stream of a planted model: one direction for everything that it knows.

Every direction is a pair of elements, one up and one down, so that a vector's mean is zero and
LayerNorm leaves it as it is; a constant that is far longer than all else keeps the norm's
scale near one. So a planted model is nearly linear between attention patterns.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch


class Coordinates:
    """Named directions of a residual stream.

    Parameters
    ----------
    names
        What the directions mean.
    d_model
        Width of the stream, at least twice the number of names.
    """

    def __init__(self, names: Sequence[str], d_model: int) -> None:
        self.index = {name: i for i, name in enumerate(names)}
        self.d_model = d_model
        if 2 * len(self.index) > d_model:
            raise ValueError(f"{len(self.index)} directions need d_model >= {2 * len(self.index)}")

    def __getitem__(self, name: str) -> torch.Tensor:
        """(d_model,) the unit vector of a direction."""
        vector = torch.zeros(self.d_model)
        place = 2 * self.index[name]
        vector[place], vector[place + 1] = math.sqrt(0.5), -math.sqrt(0.5)
        return vector


def directions(n_classes: int, n_frequencies: int) -> list[str]:
    """Names of everything that a planted model knows.

    Parameters
    ----------
    n_classes
        Classes, and as many labels.
    n_frequencies
        Frequencies in which positions are told where they are learned; 0 with rotary.
    """
    classes = range(n_classes)
    return [
        "constant",
        "text",
        "label",
        "asks",
        *(f"feature {c}" for c in classes),
        *(f"label {c}" for c in classes),
        *(f"gathered {c}" for c in classes),
        *(f"answer {c}" for c in classes),
        *(f"{wave} {f}" for f in range(n_frequencies) for wave in ("cos", "sin")),
        *(["place"] if n_frequencies else []),
    ]
