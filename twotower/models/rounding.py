"""What rounding allows: all tolerances, in one place, with their reasoning.

u is a dtype's unit roundoff, the largest relative error of one rounding: 6e-8 for float32, 4.9e-4
for float16, 3.9e-3 for bfloat16. Errors are compared with what rounding can make of them, so a
tolerance grows with the size of what is rounded, and never with the size of a fault.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float32

if TYPE_CHECKING:
    from .model import Model

QUANTIZED = {"int8": 2.0**-6, "nf4": 2.0**-8, "fp4": 2.0**-8}
"""Roundoff of a quantized module's output, relative to its size. nf4 and fp4 compute in a
compute dtype, bfloat16 unless one says otherwise, whatever the activations are. int8 rounds each
row to 255 steps of its largest element, and which columns it leaves out depends on all rows of a
call; half a step, of rows whose largest element is four times the usual one, is 2^-6 of that."""

ACCUMULATED = 128.0
"""A sum of n products is off by up to sqrt(n) roundings of float32, in which it is accumulated
whatever the dtype: 128 for n = 16,384. (Seen on SmolLM2-135M: 38 of a projection's output.)"""

ROUNDINGS = 4.0
"""Roundings of a dtype that may add up, all the same way, between what goes into a module or a
block and what comes out. (Seen: 0.7 of a module, 1.4 of a block, in bfloat16 and float16.)"""


def roundoff(dtype: torch.dtype) -> float:
    """Unit roundoff u of a dtype."""
    return torch.finfo(dtype).eps / 2


def coarsest(*tensors: torch.Tensor) -> torch.dtype:
    """Of the dtypes of some tensors that of the largest roundoff: where they meet, it rounds."""
    return max((x.dtype for x in tensors), key=roundoff)


@dataclass(frozen=True)
class Rounding:
    """What the arithmetic of a model allows.

    Parameters
    ----------
    quantization
        "int8", "nf4", "fp4", another kind, or None.
    """

    quantization: str | None = None

    @classmethod
    def of(cls, model: Model) -> Rounding:
        """The rounding of a model as it is now."""
        return cls(model.quantization)

    def is_coarse(self, dtype: torch.dtype) -> bool:
        """Whether single values of a dtype hide a fault of one percent."""
        return roundoff(dtype) > 1e-5

    def attention(
        self, dtype: torch.dtype, size: Float32[torch.Tensor, "*rest"]
    ) -> Float32[torch.Tensor, "*rest"]:
        """Error of a head's output, relative to the attended values' mean length.

        A kernel rounds a score of size s by u s, and so its weight by as large a part; weights,
        their sum and the output are rounded once each. Both sides sum products in float32. (Seen
        over kernels and dtypes: up to 0.5 of what is allowed.)

        Parameters
        ----------
        dtype
            Of the output.
        size
            Largest absolute score that is attended to.
        """
        return roundoff(dtype) * (3 + size) + roundoff(torch.float32) * (8 + 2 * size)

    def scale(
        self, dtype: torch.dtype, deviation: Float32[torch.Tensor, ""]
    ) -> Float32[torch.Tensor, ""]:
        """Factor by which the scores' scale may be off: one rounding, as far as it shows.

        Parameters
        ----------
        dtype
            Of the head's output.
        deviation
            Standard deviation of the fitted factor, from what is left over; five of them
            happen once in two million fits.
        """
        return roundoff(dtype) + 5 * deviation

    def sum(self, dtype: torch.dtype) -> float:
        """Error of a sum of three in a dtype, relative to the sum of their sizes.

        Two roundings in the model; four in float32, in which it is made again.
        """
        return 2 * roundoff(dtype) + 4 * roundoff(torch.float32)

    def module(self, dtype: torch.dtype) -> float:
        """Error of a dot product with what a module puts out, relative to its usual size."""
        quantized = 2.0**-8 if self.quantization else 0.0
        quantized = QUANTIZED.get(self.quantization or "", quantized)
        u = max(roundoff(dtype), quantized)
        return ROUNDINGS * u + ACCUMULATED * roundoff(torch.float32)

    def block(
        self, dtype: torch.dtype, score: Float32[torch.Tensor, "*rest"]
    ) -> Float32[torch.Tensor, "*rest"]:
        """Error of what leaves a block, relative to its parts' lengths, when it is run once more.

        Other rows in a product of matrices mean other orders of summation, after which each
        rounding may fall out otherwise; and scores of size s are rounded otherwise by u s.
        """
        return self.module(dtype) + roundoff(dtype) * score / 4

    def forward(self, dtype: torch.dtype, n_layers: int) -> float:
        """Error of a margin between two whole forwards, relative to the largest label logit.

        The differences of every block add up like steps at random, and those below are carried
        along by those above.
        """
        return 4 * self.module(dtype) * math.sqrt(n_layers)
