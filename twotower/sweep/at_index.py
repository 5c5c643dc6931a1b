"""How a layer's scores depend on positions, at some positions of a batch.

Shapes: G packs of n positions, given by an index (G, n) into the batch's flattened (B T) positions.
"""

from __future__ import annotations

import torch
from jaxtyping import Float

from ..models.positions import Positions
from ..walk.everywhere import Everywhere
from ..walk.views import LayerView


def tables_at(view: LayerView, index: Everywhere) -> Positions:
    """Return rotary tables and factors (G, 1, n, ...), with a dim for rows."""

    def select(table: torch.Tensor) -> torch.Tensor:
        whole = table.expand(len(view.residual), *[-1] * (table.dim() - 1))
        return index.take(whole).unsqueeze(1)

    return view.positions.tables(select)


def bias_at(view: LayerView, index: Everywhere) -> Float[torch.Tensor, "G H n"] | None:
    """Return what is added to the scores for each key (G, H, n); None without."""
    bias = view.positions.bias
    if bias is None:
        return None
    by_key = bias.expand(len(view.residual), -1, -1).transpose(1, 2)
    return index.take(by_key).transpose(1, 2)
