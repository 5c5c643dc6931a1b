"""Which modules a layer's queries, keys and values come from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import nnsight
import torch
from jaxtyping import Float

from ..models.architecture import call
from ..models.measuring import measuring, probe_inputs, probing
from ..models.wrapper import in_order

if TYPE_CHECKING:
    from ..models import Architecture, Model

INTO = ("q", "k", "v")
"""What an edge leads into: a head's queries, keys or values."""


@dataclass(frozen=True)
class Wiring:
    """The modules that read a layer's attention input (`Architecture.qkv`).

    Attributes
    ----------
    needed
        For queries, keys and values: indices of the modules that they come from.
    widths
        Number of outputs of each module.
    """

    needed: dict[str, tuple[int, ...]]
    widths: tuple[int, ...]

    def project(
        self,
        architecture: Architecture,
        block: Any,
        normed: Float[torch.Tensor, "*rest d_model"],
        into: str,
    ) -> Float[torch.Tensor, "*rest heads d"]:
        """Return queries, keys or values before rotary, calling no module that is not needed."""
        projected = []
        for number, module in enumerate(architecture.qkv(block)):
            if number in self.needed[into]:
                projected.append(call(module, normed))
            else:
                nothing = normed.new_zeros(()).expand(*normed.shape[:-1], self.widths[number])
                projected.append(nothing)
        return architecture.split(block, projected)[INTO.index(into)]


def get_wiring(model: Model) -> dict[int, Wiring]:
    """Return the wiring of every layer with heads, found once per model.

    A module is needed if its outputs, set to NaN, reach queries, keys or values.
    """
    key = ("wiring",)
    with measuring(model):
        if key not in model.cache:
            architecture, root, inputs = model.architecture, model.traced, probe_inputs(model)
            with in_order(model.name), probing(), torch.no_grad(), root.trace(**inputs):
                found = nnsight.save(_probe(architecture, root))
            model.cache[key] = {
                layer: Wiring({name: tuple(own) for name, own in needed.items()}, tuple(widths))
                for layer, needed, widths in found
            }
    known: dict[int, Wiring] = model.cache[key]
    return known


def _probe(architecture: Architecture, root: Any) -> list[tuple[int, dict[str, Any], list[int]]]:
    """Return (layer, needed, widths) of layers with heads. Only works inside a trace."""
    read = []
    for layer, block in enumerate(architecture.layers(root)):
        if architecture.has_heads(layer):
            outputs = [module.output for module in architecture.qkv(block)]
            read.append((layer, block, outputs))
    found = []
    for layer, block, outputs in read:
        needed: dict[str, list[int]] = {name: [] for name in INTO}
        for number, output in enumerate(outputs):
            broken = [*outputs]
            broken[number] = torch.full_like(output, torch.nan)
            for name, part in zip(INTO, architecture.split(block, broken), strict=True):
                if part is not None and bool(part.isnan().any()):
                    needed[name].append(number)
        found.append((layer, needed, [int(output.shape[-1]) for output in outputs]))
    return found
