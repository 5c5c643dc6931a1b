"""Tolerances for rounding errors, with their derivations.

u is a dtype's unit roundoff, the largest relative error of one rounding: 6e-8 for float32, 4.9e-4
for float16, 3.9e-3 for bfloat16. A tolerance scales with the size of the rounded values, never with
the size of an error.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float32

from ..options import option
from .architecture import Architecture

if TYPE_CHECKING:
    from .model import Model

QUANTIZED = {"int8": 2.0**-6, "nf4": 2.0**-8, "fp4": 2.0**-8}
"""Roundoff of a quantized module's output, relative to its size. nf4 and fp4 compute in their
compute dtype, by default bfloat16, for any dtype of the activations. int8 rounds each row to 255
steps of its largest element, and its outlier columns depend on all rows of a call. If the largest
element is four times the usual one, half a step is 2^-6 of the usual element."""

ACCUMULATED = 128.0
"""Float32 roundings in a sum of n products: up to sqrt(n), so 128 for n = 16,384. Sums accumulate
in float32 for every dtype. (Measured on SmolLM2-135M: 38 for a projection's output.)"""

UNSTEADY = 0.3
"""Largest error that is put down to another choice of experts. (Measured on small random models: up
to 0.19; a wrong cache or a mixed batch gives 0.7.)"""

ROUNDINGS = 4.0
"""Roundings of a dtype that may add up, with the same sign, between the input and the output of a
module or block. (Measured in bfloat16 and float16: 0.7 for a module, 1.4 for a block.)"""


def roundoff(dtype: torch.dtype) -> float:
    """Return the unit roundoff u of a dtype."""
    return torch.finfo(dtype).eps / 2


def coarsest(*tensors: torch.Tensor) -> torch.dtype:
    """Return the dtype with the largest roundoff among tensors."""
    return max((x.dtype for x in tensors), key=roundoff)


@dataclass(frozen=True)
class Rounding:
    """Tolerances for the arithmetic of a model.

    Parameters
    ----------
    quantization
        "int8", "nf4", "fp4", another kind, or None.
    score_roundings
        Number of times that the attention kernel rounds a score in the dtype of its output.
    """

    quantization: str | None = None
    score_roundings: int = 1

    @classmethod
    def of(cls, model: Model) -> Rounding:
        """Return the tolerances for the current state of a model.

        A fused kernel rounds a score once. The eager one rounds the product and the scaled
        product; with a softcap also the quotient, its tangent and the score; and with sinks the
        difference from the largest score, which may be twice as large (as four roundings).
        """
        roundings, architecture = 1, model.architecture
        if model.attention_kernel == "eager":
            roundings = 2 + 3 * (architecture.score_softcap is not None)
            roundings += 4 * (type(architecture).sinks is not Architecture.sinks)
        return cls(model.quantization, roundings)

    @classmethod
    def of_proof(cls, model: Model) -> Rounding | None:
        """Return the tolerances for a proof; None if the option `proof` is off."""
        return cls.of(model) if option("proof") else None

    def is_coarse(self, dtype: torch.dtype) -> bool:
        """Check whether a dtype hides a one-percent error in a single value."""
        return roundoff(dtype) > 1e-5

    @staticmethod
    def is_unsteady(model: Model, error: float) -> bool:
        """Check whether rounding may explain an error by another choice of experts.

        A router chooses experts by the order of its scores. In a coarse dtype, two scores that are
        nearly equal may change places when the same token is computed beside others.
        """
        coarse = roundoff(model.dtype) > 1e-5 or bool(model.quantization)
        if not coarse or not error <= UNSTEADY:
            return False
        return any("expert" in type(part).__name__.lower() for part in model.module.modules())

    def attention(
        self,
        dtype: torch.dtype,
        size: Float32[torch.Tensor, "*rest"],
        products: Float32[torch.Tensor, "*rest"],
    ) -> Float32[torch.Tensor, "*rest"]:
        """Return the tolerance of a head's output, relative to the attended values' mean norm.

        A kernel rounds a score of size s by u s, which changes its weight by the relative error
        u s; several roundings add up like a random walk. Weights, their sum and the output are
        each rounded once. Both sides sum products in float32. The products of a score's sum may
        cancel: then its error follows their size, at most the norms' product, not that of the
        score. Query and key are rotated (two roundings each), multiplied, summed and scaled, on
        both sides: some twelve roundings that add up like a random walk. (Measured: up to 3 u times
        the product in planted models with scores of up to 135, once 4; over kernels and dtypes up
        to 0.5 of the tolerance.)

        Parameters
        ----------
        dtype
            Dtype of the output.
        size
            Largest absolute attended score.
        products
            Largest product of the norms of query and visible key, times the scaling.
        """
        accumulated = roundoff(torch.float32) * (8 + 2 * size + 4 * products)
        return roundoff(dtype) * (3 + math.sqrt(self.score_roundings) * size) + accumulated

    def scale(
        self, dtype: torch.dtype, deviation: Float32[torch.Tensor, ""]
    ) -> Float32[torch.Tensor, ""]:
        """Return the tolerance of the fitted scale of the scores: one rounding plus the fit error.

        Parameters
        ----------
        dtype
            Dtype of the head's output.
        deviation
            Standard deviation of the fitted factor, from the residuals. Five deviations happen
            once in two million fits.
        """
        return roundoff(dtype) + 5 * deviation

    def sum(self, dtype: torch.dtype, scaled: bool = False) -> float:
        """Return the tolerance of a sum of three terms, relative to the sum of their sizes.

        The model rounds twice in the dtype; the recomputed sum rounds four times in float32. If
        factors scale the stream, the model also rounds two products, and the recomputation one.
        """
        return (5 if scaled else 2) * roundoff(dtype) + 4 * roundoff(torch.float32)

    def module(self, dtype: torch.dtype) -> float:
        """Return the tolerance of a dot product with a module's output, relative to its size."""
        quantized = 2.0**-8 if self.quantization else 0.0
        quantized = QUANTIZED.get(self.quantization or "", quantized)
        u = max(roundoff(dtype), quantized)
        return ROUNDINGS * u + ACCUMULATED * roundoff(torch.float32)

    def block(
        self, dtype: torch.dtype, score: Float32[torch.Tensor, "*rest"]
    ) -> Float32[torch.Tensor, "*rest"]:
        """Return the tolerance of a block's output in a second run, relative to its parts' norms.

        A matrix product with other rows may sum in another order, so every rounding may differ;
        scores of size s differ by u s.
        """
        return self.module(dtype) + roundoff(dtype) * score / 4

    def forward(self, dtype: torch.dtype, n_layers: int) -> float:
        """Return the tolerance of the margin of two forwards, relative to the largest label logit.

        The blocks' differences add up like a random walk, and later blocks propagate earlier ones.
        """
        return 4 * self.module(dtype) * math.sqrt(n_layers)
