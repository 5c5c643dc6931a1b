"""Proof with every batch: identities that must hold on the measured prompts themselves.

During the walk, each layer is reassembled from its parts and compared with the model's own result.
Each comparison is a *claim*: an error and the error that rounding allows
(`twotower.models.rounding`), for each prompt and, if possible, each head. Datasets record the
claims in their attribute `proof`. A claim that does not hold raises `CheckError`.

Shapes: B prompts of T positions, H heads on K key-value heads, D elements of a head.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Float32
from torch.nn.functional import pad

from ..models.rounding import Rounding, roundoff
from .kept import Again, Heads, Kept
from .last import LastAttention
from .readout import dot
from .recorder import Recorder
from .views import End, LayerView, PassingView

if TYPE_CHECKING:
    from .readout import Readout

IDENTITIES = {
    "attention": "attention recomputed from queries, keys and values does not give the head's "
    "output",
    "scale": "the scores are not as large as recomputed ones",
    "block": "residual stream, attention and MLP do not sum to what the next block reads",
    "label directions": "the heads' label logits and the bias do not sum to that of the "
    "attention output",
    "logits": "final norm and unembedding of the last residual stream do not give the model's "
    "own logits",
    "parts": "the parts of queries, keys or values do not sum to the whole, as where a model "
    "clips them",
    "unchanged edge": "a head that reads the unchanged stream once more does not give its own "
    "output",
    "unchanged row": "a counterfactual in which nothing is changed leaves the clean run",
}
"""Identities that every batch must fulfil; each text describes the failure."""


WAITING_BYTES = 16 << 20
"""Default of `Proof.waiting_bytes`; where a memory budget is given, nothing waits."""

AT_ONCE = 4
"""Number of prompts whose log-sum-exp is computed at a time."""


@dataclass
class Claim:
    """Comparisons of one identity made in a walk, for L layers.

    Attributes
    ----------
    identity
        One of `IDENTITIES`.
    layers
        (L,) numbers of the layers; None at the end of the model.
    error, allowed
        Errors (L, B) or (L, B, H), and the allowed errors in a shape that expands to it.
    """

    identity: str
    layers: Sequence[int | None]
    error: Float32[torch.Tensor, "L B *H"]
    allowed: Float32[torch.Tensor, "*any"]


def finite_claims(
    own_z: Float[torch.Tensor, "*at D"],
    error: Float32[torch.Tensor, "*at"],
    allowed: Float32[torch.Tensor, "*at"],
) -> tuple[Float32[torch.Tensor, "*at"], Float32[torch.Tensor, "*at"]]:
    """Return errors (...,) and allowed ones of heads' outputs, 0 where the model's are not finite.

    An overflow reaches the logits, and the prompt is missing then, unless an edit replaces it.
    """
    lost = ~own_z.isfinite().all(dim=-1)
    return error.masked_fill(lost, 0), allowed.masked_fill(lost, 0)


class Proof(Recorder):
    """Makes the claims about a batch's last positions, and collects those of other recorders.

    Parameters
    ----------
    rounding
        Errors that the model's arithmetic allows.
    others
        Other recorders of the walk, whose claims are collected.
    waiting_bytes
        Bytes of keys and values that may wait until the heads of a few layers are recomputed.
    earlier
        Columns before the last, by layer, at which attention is recomputed too.
    """

    group = "proof"

    def __init__(
        self,
        rounding: Rounding,
        others: Sequence[Recorder] = (),
        waiting_bytes: int = WAITING_BYTES,
        earlier: Mapping[int, int] | None = None,
    ) -> None:
        self.rounding, self.others, self.waiting_bytes = rounding, others, waiting_bytes
        self.earlier = {} if earlier is None else earlier
        readouts = [other.readout for other in others if other.readout is not None]
        self.readout: Readout | None = readouts[0] if readouts else None
        self.claims: list[Claim] = []
        self.kept: list[Kept] = []
        self.again: dict[int, Again] = {}
        self.waiting: list[LastAttention] = []
        self.scales: list[torch.Tensor] = []

    def layer(self, view: LayerView) -> None:
        with torch.no_grad():  # a decorator would hide this method's source from the server
            assert view.attention_write is not None
            assert view.mlp_write is not None
            added = view.attention_write
            if view.mixer_write is not None:
                added = added + view.mixer_write
            last = view.mlp_write
            if view.more_write is not None:
                last = last + view.more_write
            kept = Kept.of(view, view.z.device, (view.residual, added, last))
            kept.factor = view.factor
            kept.heads = Heads.of(view)
            self.kept.append(kept)
            if view.index in self.earlier:
                self._earlier(view, self.earlier[view.index])
            self._wait(view.last)

    def _earlier(self, view: LayerView, column: int) -> None:
        """Claim an earlier position's attention, which shows a model that is not causal."""
        again = Again.of(view.until(column), coarse=False)
        left = view.own_z[:, column].float() - again.z
        error = left.norm(dim=-1) / again.length.clamp(min=torch.finfo(torch.float32).tiny)
        allowed = self.rounding.attention(view.own_z.dtype, again.score, again.products)
        error, allowed = finite_claims(view.own_z[:, column], error, allowed)
        self.claims.append(Claim("attention", [view.index], error[None], allowed[None]))

    def _wait(self, last: LastAttention) -> None:
        """Recompute a layer's heads at once if a measure has done most of it, or a few together.

        The first operation of its kind after others takes longer than the next ones.
        """
        if last.computed:
            self._recompute([last])
            return
        last.query = last.query.clone()  # a view would keep those of all positions in memory
        self.waiting.append(last)
        if sum(layer.n_bytes for layer in self.waiting) > self.waiting_bytes:
            self._recompute(self.waiting)
            self.waiting = []

    def _recompute(self, layers: Sequence[LastAttention]) -> None:
        for last in layers:
            coarse = self.rounding.is_coarse(last.value.dtype)
            self.again[last.index] = Again.of(last, coarse)

    def passing(self, view: PassingView) -> None:
        with torch.no_grad():
            parts = (view.residual, view.mixer_write, view.mlp_write)
            self.kept.append(Kept.of(view, view.residual.device, parts))

    def finish(self, end: End) -> dict[Any, torch.Tensor]:
        with torch.no_grad():
            return self._finish(end)

    def _finish(self, end: End) -> dict[Any, torch.Tensor]:
        self._recompute(self.waiting)
        for _, some in groupby(self.kept, lambda kept: kept.kind):
            layers = list(some)
            after, device = layers[-1].index + 1, layers[0].sums.device
            left = end.residual if end.left is None else end.left
            next_residual = left if after == len(self.kept) else self.kept[after].left
            self._blocks(layers, next_residual.to(device))
            heads = [kept.heads for kept in layers if kept.heads is not None]
            if heads:
                again = [self.again[kept.index] for kept in layers]
                self._attention(layers, heads, again)
                if self.readout is not None:
                    self._directions(layers, heads, self.readout.on(device))
        self._scale_of_all(end.residual.device)
        if self.readout is not None:
            self._logits(end, self.readout)
        for other in self.others:
            self.claims += other.claims
        return _gathered(self.claims, end.residual.device)

    def _claim(
        self,
        identity: str,
        layers: Sequence[Kept],
        error: Float32[torch.Tensor, "L B *H"],
        allowed: Float32[torch.Tensor, "*any"],
    ) -> None:
        self.claims.append(Claim(identity, [kept.index for kept in layers], error, allowed))

    def _blocks(self, layers: Sequence[Kept], after: Float[torch.Tensor, "B d_model"]) -> None:
        """Claim that each block's parts sum to the residual stream after it."""
        sums = torch.stack([kept.sums for kept in layers]).float()
        after_each = [*(kept.left.float() for kept in layers[1:]), after.float()]
        next_residual = torch.stack(after_each)
        factors = [kept.factor for kept in layers if kept.factor is not None]
        if factors:
            sums = sums * torch.stack([x.to(sums).view(1, 1, 1) for x in factors])
        left = (sums.sum(dim=1) - next_residual).abs()
        size = sums.abs().sum(dim=1)
        error = (left / size.clamp(min=torch.finfo(size.dtype).tiny)).amax(dim=-1)
        dtypes = [kept.dtype for kept in layers]
        dtypes = [max(x, y, key=roundoff) for x, y in pairwise([*dtypes, after.dtype])]
        allowed = _allowed((self.rounding.sum(x, scaled=bool(factors)) for x in dtypes), error)
        self._claim("block", layers, error, allowed)

    def _attention(
        self, layers: Sequence[Kept], heads: Sequence[Heads], again: Sequence[Again]
    ) -> None:
        """Claim that each head's output is that of its queries, keys and values."""
        own = torch.stack([kept.own_z for kept in heads]).float()
        left = own - torch.stack([layer.z for layer in again])
        length = torch.stack([layer.length for layer in again])
        length = length.clamp(min=torch.finfo(length.dtype).tiny)
        score = torch.stack([layer.score for layer in again])
        dtype = heads[0].own_z.dtype
        error = left.norm(dim=-1) / length
        products = torch.stack([layer.products for layer in again])
        allowed = self.rounding.attention(dtype, score, products)
        self._claim("attention", layers, *finite_claims(own, error, allowed))
        slopes = [layer.slope for layer in again if layer.slope is not None]
        if slopes:
            length = length[..., None]
            self._scale(layers, left / length, torch.stack(slopes) / length, dtype)

    def _scale(
        self,
        layers: Sequence[Kept],
        left: Float32[torch.Tensor, "L B H D"],
        slope: Float32[torch.Tensor, "L B H D"],
        dtype: torch.dtype,
    ) -> None:
        """Claim that the model's scores have the same scale as recomputed ones, in each layer.

        A coarse dtype hides a scale error of one percent in a single output. A least-squares fit
        over all heads and prompts detects it, for each layer and for all layers.
        """
        each = left * slope
        sums = torch.stack([x.sum(dim=(2, 3)) for x in (each, slope.square(), each.square())])
        # Prompts that are not finite are handled by `not_finite`.
        sums = sums.where(sums.isfinite().all(dim=0), 0).sum(dim=2)
        self.scales.append(sums)
        error, allowed = self._fitted(sums, dtype)
        self._claim("scale", layers, error[:, None].expand(-1, left.shape[1]), allowed[:, None])

    def _fitted(
        self, sums: Float32[torch.Tensor, "3 L"], dtype: torch.dtype
    ) -> tuple[Float32[torch.Tensor, " L"], Float32[torch.Tensor, " L"]]:
        total = sums[1].clamp(min=torch.finfo(sums.dtype).tiny)
        return (sums[0] / total).abs(), self.rounding.scale(dtype, sums[2].sqrt() / total)

    def _scale_of_all(self, device: torch.device) -> None:
        """Claim that the scores of all layers together have the right scale."""
        if self.scales:
            sums = torch.cat([x.to(device) for x in self.scales], dim=1).sum(dim=1, keepdim=True)
            heads = [kept.heads for kept in self.kept if kept.heads is not None]
            coarse = [own.own_z.dtype for own in heads if self.rounding.is_coarse(own.own_z.dtype)]
            error, allowed = self._fitted(sums, max(coarse, key=roundoff))
            n = self.kept[0].sums.shape[1]
            self.claims.append(Claim("scale", [None], error[:, None].expand(-1, n), allowed))

    def _directions(self, layers: Sequence[Kept], heads: Sequence[Heads], readout: Readout) -> None:
        """Claim that the heads' label logits and the bias sum to that of the attention output."""
        z = torch.stack([kept.z for kept in heads]).float()
        written = torch.stack([kept.write for kept in heads]).float()
        at = slice(layers[0].index, layers[-1].index + 1)
        directions = torch.stack([x for x in readout.directions[at] if x is not None])
        product = "lbhd,lhdk->lbk" if directions.dim() == 4 else "lbhd,lbhdk->lbk"
        found = torch.einsum(product, z, directions)
        found = found + _by_label(readout.projection_bias[at])
        terms = torch.einsum(product, z.square(), directions.square()).sqrt()
        norms = [norm for norm in readout.post_norms[at] if norm is not None]
        outputs = [kept.output for kept in heads if kept.output is not None]
        if norms:
            pairs = zip(norms, outputs, strict=True)
            spread = torch.stack([norm.statistic(output) for norm, output in pairs])[..., None]
            found, terms = found / spread + _by_label(readout.write_bias[at]), terms / spread
        label = readout.label_directions
        written = written * readout.factors[at][:, None, None]
        by_prompt = written.transpose(0, 1)  # (B, layer, d_model)
        left = (found - dot(by_prompt, label).transpose(0, 1)).abs()
        size = terms + dot(by_prompt.square(), label.square()).transpose(0, 1).sqrt()
        least = torch.finfo(size.dtype).tiny ** 0.5  # squares of smaller numbers vanish
        error = (left / size.clamp(min=least)).amax(dim=-1)
        allowed = _allowed((self.rounding.module(kept.dtype) for kept in heads), error)
        self._claim("label directions", layers, error, allowed)

    def _logits(self, end: End, readout: Readout) -> None:
        """Claim that norm and unembedding of the last residual stream give the model's logits."""
        own = readout.on(end.residual.device)
        normed = own.frozen_norm(end.residual, own.spread(end.residual))
        found = own.label_logits(normed)
        expected = readout.of_labels(end.logits).to(found.device)
        size = dot(normed.square(), own.rows.square()).sqrt() + expected.abs()
        tiny = torch.finfo(size.dtype).tiny  # the row of a padding token may be zero
        error = ((found - expected).abs() / size.clamp(min=tiny)).amax(dim=-1)
        dtype = max(end.dtype, end.residual.dtype, key=roundoff)
        allowed = torch.full_like(error, self.rounding.module(dtype))
        self.claims.append(Claim("logits", [None], error[None], allowed))
        for other in self.others:
            if other.final_logprobs is not None:
                self._vocabulary(end, readout, other.final_logprobs, allowed)

    def _vocabulary(
        self,
        end: End,
        readout: Readout,
        found: Float32[torch.Tensor, "B label"],
        allowed: Float32[torch.Tensor, " B"],
    ) -> None:
        """Claim that the labels' log-probabilities agree, which depend on the whole vocabulary."""
        labels = readout.of_labels(end.logits)
        low, high = end.logits.aminmax(dim=-1)
        # A few prompts at a time, to save memory.
        total = torch.cat([some.logsumexp(dim=-1) for some in end.logits.split(AT_ONCE)])
        expected = labels - total[:, None]
        size = torch.maximum(high, -low) + expected.abs().amax(dim=-1)
        both = torch.cat((expected, size[:, None]), dim=-1).to(found.device)
        error = (found - both[:, :-1]).abs().amax(dim=-1)
        self.claims.append(Claim("logits", [None], (error / both[:, -1])[None], allowed))


class Proved(Recorder):
    """Recorder of donors that runs a proof too."""

    def __init__(self, recorder: Recorder, proof: Proof) -> None:
        self.recorder, self.proof = recorder, proof

    def layer(self, view: LayerView) -> None:
        self.recorder.layer(view)
        self.proof.layer(view)

    def passing(self, view: PassingView) -> None:
        self.recorder.passing(view)
        self.proof.passing(view)

    def finish(self, end: End) -> dict[Any, torch.Tensor]:
        self.proof.finish(end)
        return self.recorder.finish(end)


def _by_label(
    biases: Float[torch.Tensor, "layer *B label"],
) -> Float[torch.Tensor, "layer B_or_1 label"]:
    """Return biases by layer and label, with a dim for the prompt."""
    return biases if biases.dim() == 3 else biases[:, None]


def _allowed(
    values: Iterable[float], error: Float32[torch.Tensor, "L B"]
) -> Float32[torch.Tensor, "L 1"]:
    """Return allowed errors of L layers on the errors' device."""
    values = list(values)
    if len(set(values)) == 1:  # filled on the device: a copy from the CPU would wait
        return torch.full_like(error[:, :1], values[0])
    return torch.stack([torch.full_like(error[0, :1], value) for value in values])


def _gathered(claims: Iterable[Claim], device: torch.device) -> dict[Any, torch.Tensor]:
    """Return errors and allowed errors (2, layer, B, *H), by identity and layers."""
    found: dict[str, dict[int | None, torch.Tensor]] = {}
    for claim in claims:
        both = torch.stack((claim.error, claim.allowed.expand_as(claim.error))).detach()
        layers = found.setdefault(claim.identity, {})
        for layer, new in zip(claim.layers, both.float().to(device).unbind(dim=1), strict=True):
            layers[layer] = new if layer not in layers else _worse(layers[layer], new)
    return {(name, tuple(layers)): _even(layers.values()) for name, layers in found.items()}


def _even(by_layer: Iterable[torch.Tensor]) -> Float32[torch.Tensor, "2 layer B *H"]:
    """Return layers' claims (2, B, *H) as one tensor, with errors of 0 for absent heads."""
    layers = list(by_layer)
    widest = max(claims.shape[-1] for claims in layers)
    return torch.stack([pad(claims, (0, widest - claims.shape[-1])) for claims in layers], dim=1)


def _worse(
    a: Float32[torch.Tensor, " 2 *rest"], b: Float32[torch.Tensor, " 2 *rest"]
) -> Float32[torch.Tensor, " 2 *rest"]:
    """Return the worse of two claims elementwise, by error over allowed error; NaN is worst."""
    worse = ~(b[0] * a[1] <= a[0] * b[1])
    return torch.where(worse, b, a)
