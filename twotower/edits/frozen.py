"""Blocks with frozen norms, which are linear: parts of their input become parts of their output.

A `Frozen` block is called like the block it wraps. First the whole input passes through it, and
every norm on the way notes its statistic. Then parts of the input pass: norms divide by the noted
statistics, and biases are left out. So the outputs of the parts, and of the biases alone, sum to
the output of the whole.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from jaxtyping import Float

from ..models import Architecture

Mode = Literal["whole", "part", "biases"]


@dataclass
class Pass:
    """Mode of a frozen block, and the statistics of its norms.

    Attributes
    ----------
    architecture
        Adapter, which knows the norms' epsilons.
    mode
        "whole": note statistics. "part": without biases. "biases": with them.
    statistics
        Root mean squares of each norm's input, by the norm's path.
    centred
        Whether each norm subtracts the mean, by its path.
    """

    architecture: Architecture
    mode: Mode = "whole"
    statistics: dict[str, torch.Tensor] = field(default_factory=dict)
    centred: dict[str, torch.Tensor] = field(default_factory=dict)


class Frozen:
    """A module whose norms are frozen; its submodules are, too.

    Parameters
    ----------
    module
        nnsight's envoy of the module.
    passing
        Mode of the block, and the statistics of its norms.
    path
        Path of the module in the block.
    """

    def __init__(self, module: Any, passing: Pass, path: str = "") -> None:
        self._wrapped, self._passing, self._path = module, passing, path

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._wrapped, name)
        if isinstance(value, torch.nn.Module) or hasattr(value, "_module"):
            return Frozen(value, self._passing, f"{self._path}.{name}")
        return value

    def __call__(self, x: Float[torch.Tensor, "*rest d"]) -> Float[torch.Tensor, "*rest out"]:
        """Return the module's output; rows of parts come before all other dims."""
        module, passing, path = self._wrapped, self._passing, self._path
        own = getattr(module, "_module", module)
        if "norm" not in type(own).__name__.lower():
            out: torch.Tensor = module(x)
            if passing.mode == "part":
                out = out - module(torch.zeros_like(x))
            return out
        epsilon = passing.architecture.epsilon(module)
        if passing.mode == "whole":
            passing.centred[path] = _centres(module, x)
            passing.statistics[path] = _statistic(x, passing.centred[path], epsilon)
            whole: torch.Tensor = module(x)
            return whole
        shift = module(torch.zeros_like(x))
        direct = _direct(module, x, shift, passing.statistics[path], passing.centred[path], epsilon)
        found = direct if passing.mode == "part" else direct + shift.float()
        return found.to(x.dtype)


def _direct(
    norm: Any,
    x: Float[torch.Tensor, "*rest d"],
    shift: Float[torch.Tensor, "*shift d"],
    frozen: Float[torch.Tensor, "*whole"],
    centred: torch.Tensor,
    epsilon: float,
) -> Float[torch.Tensor, "*rest d"]:
    """Return a norm of parts x, without its shift, with statistics that repeat along the parts."""
    statistic = _statistic(x, centred, epsilon)
    frozen = frozen.flatten().repeat(statistic.numel() // frozen.numel()).view_as(statistic)
    direct: torch.Tensor = norm(x) - shift
    return direct.float() * (statistic / frozen).unsqueeze(-1)


def _statistic(
    x: Float[torch.Tensor, "*rest d"], centred: torch.Tensor, epsilon: float
) -> Float[torch.Tensor, "*rest"]:
    x = x.float()
    x = torch.where(centred, x - x.mean(dim=-1, keepdim=True), x)
    return (x.square().mean(dim=-1) + epsilon).sqrt()


def _centres(norm: Any, like: Float[torch.Tensor, "*rest d"]) -> torch.Tensor:
    """Return whether a norm subtracts the mean: then it maps a constant to its bias."""
    ones = torch.ones_like(like)
    signs = torch.ones_like(like)
    signs[..., 1::2] = -1
    shift = norm(torch.zeros_like(like))
    moved: torch.Tensor = (norm(ones) - shift).abs().max() < 0.1 * (norm(signs) - shift).abs().max()
    return moved


def frozen_write(
    norm: Any,
    output: Float[torch.Tensor, "n *rest d_model"],
    whole: Float[torch.Tensor, "*rest d_model"],
    epsilon: float,
) -> Float[torch.Tensor, "n *rest d_model"]:
    """Return parts of a norm's output, from parts of its input, with the whole's statistic."""
    centred = _centres(norm, whole)
    shift, frozen = norm(torch.zeros_like(whole)), _statistic(whole, centred, epsilon)
    return _direct(norm, output.to(whole.dtype), shift, frozen, centred, epsilon)
