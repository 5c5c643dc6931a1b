"""The residual stream of a planted model: one direction per feature.

Each direction is a pair of elements, +x and -x: a vector's mean is zero, so LayerNorm's centring
does not change it. A constant much longer than the rest keeps the norm's scale near one.
So a planted model is nearly linear apart from its attention patterns.
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
        Names of the directions.
    d_model
        Width of the stream, at least twice the number of names.
    """

    def __init__(self, names: Sequence[str], d_model: int) -> None:
        self.index = {name: i for i, name in enumerate(names)}
        self.d_model = d_model
        if 2 * len(self.index) > d_model:
            raise ValueError(f"{len(self.index)} directions need d_model >= {2 * len(self.index)}")

    def __getitem__(self, name: str) -> torch.Tensor:
        """(d_model,) unit vector of a direction."""
        vector = torch.zeros(self.d_model)
        place = 2 * self.index[name]
        vector[place], vector[place + 1] = math.sqrt(0.5), -math.sqrt(0.5)
        return vector


def directions(n_classes: int, n_frequencies: int) -> list[str]:
    """Return the names of all directions of a planted model.

    Parameters
    ----------
    n_classes
        Number of classes, and of labels.
    n_frequencies
        Number of frequencies of learned positions; 0 with rotary.
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
