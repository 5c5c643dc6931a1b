"""The multiplications that measures cannot do without, of models whose layers may differ."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from twotower.models import Architecture, Model
from twotower.sweep.counterfactuals import Group, plan

STATE = 6
"""Operations of a linear attention or state space on an element of its state, for each token:
decay, update and readout, a multiplication and an addition each."""


@dataclass
class LayerFloor:
    """Multiply-adds, twice, of a layer's parts.

    Attributes
    ----------
    queries, keys
        A token through what makes queries and gates, and through what makes keys and values.
    projecting, mlp, mixing
        A token through the output projection, the MLP and the mixer; 0 without.
    pair
        Attention between two positions.
    window
        Positions that a query attends to, its own included; None for all.
    """

    queries: float = 0.0
    keys: float = 0.0
    projecting: float = 0.0
    mlp: float = 0.0
    mixing: float = 0.0
    pair: float = 0.0
    window: int | None = None

    @classmethod
    def of(cls, a: Architecture, index: int, block: Any) -> LayerFloor:
        """The floor of a layer whose matrices are `torch.nn.Linear` or GPT-2's Conv1D."""
        found = cls(mlp=linear(a.mlp(block)) if a.has_mlp(index) else 0.0)
        if a.mixes(index):
            mixer = a.mixer(block)
            convolutions = [m for m in mixer.modules() if isinstance(m, nn.Conv1d)]
            kernels = sum(m.weight.numel() for m in convolutions)
            found.mixing = linear(mixer) + 2 * kernels + STATE * max(0, a.mixer_state() - kernels)
        if a.has_heads(index):
            attention, n_heads = a.attention(block), a.heads_in(index)
            found.projecting = linear(a.projection(block))
            before = linear(attention) - found.projecting
            found.keys = sum(linear(m) for name, m in attention.named_children() if name[0] in "kv")
            if not found.keys:  # one matrix makes queries, keys and values
                found.keys = before * 2 * a.n_kv_heads / (n_heads + 2 * a.n_kv_heads)
            found.queries = before - found.keys
            found.pair = 2 * n_heads * (a.d_key + a.d_head)
            found.window = a.window(index)
        return found

    @property
    def token(self) -> float:
        """A token through the layer, attention's scores left out."""
        return self.queries + self.keys + self.projecting + self.mlp + self.mixing

    def seen(self, n: float) -> float:
        """Attention of n positions to those before them and to themselves."""
        w = n if self.window is None else min(n, self.window)
        return self.pair * (w * (w + 1) / 2 + (n - w) * w)


def linear(module: Any) -> float:
    """Twice the multiply-adds of a vector with all matrices of a module."""
    total = 0.0
    for part in module.modules():
        if isinstance(part, nn.Linear):
            total += 2 * part.in_features * part.out_features
        elif isinstance(part, Conv1D):
            total += 2 * part.nx * part.nf
    return total


class Floor:
    """Multiply-adds, twice, of a model's measures.

    Parameters
    ----------
    model
        A model without experts.
    """

    def __init__(self, model: Model) -> None:
        self.a, self.heads = model.architecture, model.heads
        blocks = enumerate(self.a.layers(model.module))
        self.layers = [LayerFloor.of(self.a, index, block) for index, block in blocks]

    def unembedded(self, vectors: float) -> float:
        """Vectors over the whole vocabulary."""
        return 2 * self.a.d_model * self.a.vocabulary_size * vectors

    def plain(self, n: float) -> float:
        """A forward of n tokens."""
        return sum(n * layer.token + layer.seen(n) for layer in self.layers) + self.unembedded(1)

    def rows(self, n: float, changed: float, groups: Sequence[Group] | None = None) -> float:
        """Rows of the last `changed` of n positions, for single heads or groups of heads.

        What groups share is counted once: a row goes through the blocks below its highest
        heads with all rows that have the same lower heads. In the last block a row of
        several positions needs keys and values of all, and the rest of its last position
        alone. In a parallel block a row that branches off has its parent's MLP output. A
        mixer's state before the changed positions is made once more for all rows.
        """
        groups = [(head,) for head in self.heads] if groups is None else groups
        total, earlier = 0.0, n - changed
        for layer, step in zip(self.layers, plan(groups, len(self.layers)).steps, strict=True):
            last = layer is self.layers[-1]
            attending = changed * (layer.queries + layer.keys)
            attending += layer.seen(n) - layer.seen(earlier)
            if last and changed > 1:
                seen = n if layer.window is None else min(n, layer.window)
                attending = changed * layer.keys + layer.queries + layer.pair * seen
            total += step.n_before * (attending + changed * layer.mixing)
            total += earlier * layer.mixing if step.n_before else 0
            through = len(step.kept) + len(step.parents)
            fed = step.n_before if self.a.parallel else through
            total += (1 if last else changed) * (through * layer.projecting + fed * layer.mlp)
        return total

    def parts(self, n: float, n_labels: int) -> dict[str, float]:
        """All measures of a prompt of n tokens, each by itself, the clean forward first."""
        a, n_layers, n_heads = self.a, len(self.layers), len(self.heads)
        return {
            "clean forward": self.plain(n),
            "sweep": self.rows(n, 1),
            "log-probabilities of the sweep": self.unembedded(n_heads),
            # Each head's slice of the projection, an unembedding for it and for each layer.
            "attribution": self.unembedded(n_heads + n_layers)
            + sum(layer.projecting for layer in self.layers),
            "QK": 3 * sum(layer.pair for layer in self.layers) * n / 2,
            "OV": 2 * n * n_labels * n_heads * a.d_head,
        }
