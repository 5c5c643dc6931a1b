"""Proof with every batch: identities that must hold on the measured prompts themselves.

During the walk, each layer is reassembled from its parts and compared with the model's own result.
Each comparison is a *claim*: an error and the error that rounding allows
(`twotower.models.rounding`), for each prompt and, if possible, each head. Datasets record the
claims in their attribute `proof`. A claim that does not hold raises `CheckError`.

Shapes: B prompts of T positions, H heads on K key-value heads, D elements of a head.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Float32

from ..models.rounding import Rounding, coarsest, roundoff
from .walk import End, LayerView, Recorder

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
    "unchanged row": "a counterfactual in which nothing is changed leaves the clean run",
}
"""Identities that every batch must fulfil; each text describes the failure."""


AT_ONCE = 4
"""Number of prompts whose log-sum-exp is computed at a time."""


@dataclass
class Claim:
    """A comparison made in a walk.

    Attributes
    ----------
    identity
        One of `IDENTITIES`.
    layer
        Number of the layer; None at the end of the model.
    error, allowed
        Error (B,) or (B, H), and the allowed error in a shape that expands to it.
    """

    identity: str
    layer: int | None
    error: Float32[torch.Tensor, " B *H"]
    allowed: Float32[torch.Tensor, "*any"]


class Proof(Recorder):
    """Makes the claims about a batch's last positions, and collects those of other recorders.

    Parameters
    ----------
    rounding
        Errors that the model's arithmetic allows.
    others
        Other recorders of the walk, whose claims are collected.
    """

    group = "proof"

    def __init__(self, rounding: Rounding, others: Sequence[Recorder] = ()) -> None:
        self.rounding, self.others = rounding, others
        readouts = [other.readout for other in others if other.readout is not None]
        self.readout: Readout | None = readouts[0] if readouts else None
        self.claims: list[Claim] = []
        self.parts: tuple[torch.Tensor, ...] | None = None
        self.scales: torch.Tensor | None = None

    def layer(self, view: LayerView) -> None:
        with torch.no_grad():  # a decorator would hide this method's source from the server
            self._layer(view)

    def _layer(self, view: LayerView) -> None:
        self._block(view.index - 1, view.residual[:, -1])
        self._attention(view)
        if self.readout is not None:
            self._directions(view, self.readout.on(view.z.device))
        assert view.attention_output is not None
        assert view.mlp_output is not None
        parts = (view.residual, view.attention_output, view.mlp_output)
        # Copies, because views would keep the whole residual stream in memory.
        self.dtype = coarsest(*parts)
        self.parts = tuple(x[:, -1].to(view.z.device).float().clone() for x in parts)

    def _attention(self, view: LayerView) -> None:
        weights, value = view.attention, view.value.float()
        grouped = weights.unflatten(1, (value.shape[2], -1))
        by_head = value.permute(0, 2, 1, 3)
        again = (grouped @ by_head).flatten(1, 2)
        own = view.own_z[:, -1].float()
        lengths = by_head.norm(dim=-1)[:, :, None]
        length = (grouped * lengths).sum(dim=-1).flatten(1)
        length = length.clamp(min=torch.finfo(length.dtype).tiny)
        error = (again - own).norm(dim=-1) / length
        allowed = self.rounding.attention(view.own_z.dtype, view.score_size)
        self.claims.append(Claim("attention", view.index, error, allowed))
        if self.rounding.is_coarse(view.own_z.dtype):
            self.scale_dtype = view.own_z.dtype
            shown = view.scores.masked_fill(~view.visible(), 0)
            spread = (weights * (shown - (weights * shown).sum(dim=-1, keepdim=True))).unflatten(
                1, (value.shape[2], -1)
            )
            slope = (spread @ by_head).flatten(1, 2) / length[..., None]
            self._scale(view, (own - again) / length[..., None], slope)

    def _scale(
        self,
        view: LayerView,
        left: Float32[torch.Tensor, "B H D"],
        slope: Float32[torch.Tensor, "B H D"],
    ) -> None:
        """Claim that the model's scores have the same scale as recomputed ones.

        A coarse dtype hides a scale error of one percent in a single output. A least-squares fit
        over all heads and prompts detects it, for each layer and for all layers. `slope` is the
        output's derivative with respect to the logarithm of the scale.
        """
        each = (left * slope).flatten(1)
        sums = torch.stack((each.sum(dim=1), slope.square().sum(dim=(1, 2)), each.square().sum(1)))
        # Prompts that are not finite are handled by `not_finite`.
        total = sums.where(sums.isfinite().all(dim=0), 0).sum(dim=1)
        self._fitted(view.index, total, view.own_z.dtype, len(each))
        total = total.to(self.scales.device) if self.scales is not None else total
        self.scales = total if self.scales is None else self.scales + total

    def _fitted(
        self, layer: int | None, sums: Float32[torch.Tensor, " 3"], dtype: torch.dtype, n: int
    ) -> None:
        total = sums[1].clamp(min=torch.finfo(sums.dtype).tiny)
        allowed = self.rounding.scale(dtype, sums[2].sqrt() / total)
        error = (sums[0] / total).abs().expand(n)
        self.claims.append(Claim("scale", layer, error, allowed))

    def _block(self, index: int, after: Float[torch.Tensor, "B d_model"]) -> None:
        """Claim that a block's parts sum to the residual stream after it."""
        if self.parts is None:
            return
        parts = [part.to(after.device) for part in self.parts]
        size = torch.stack(parts).abs().sum(dim=0)
        left = (sum(parts) - after.float()).abs()
        error = (left / size.clamp(min=torch.finfo(size.dtype).tiny)).amax(dim=-1)
        allowed = torch.full_like(
            error, self.rounding.sum(max(self.dtype, after.dtype, key=roundoff))
        )
        self.claims.append(Claim("block", index, error, allowed))

    def _directions(self, view: LayerView, readout: Readout) -> None:
        z = view.z[:, -1].float()
        directions = readout.directions[view.index]
        assert view.attention_output is not None
        written = view.attention_output[:, -1].float()
        found = torch.einsum("bhd,hdl->bl", z, directions) + readout.projection_bias[view.index]
        label = readout.label_directions
        left = (found - written @ label.T).abs()
        terms = torch.einsum("bhd,hdl->bl", z.square(), directions.square())
        size = terms.sqrt() + (written.square() @ label.T.square()).sqrt()
        error = (left / size.clamp(min=torch.finfo(size.dtype).tiny)).amax(dim=-1)
        allowed = torch.full_like(
            error, self.rounding.module(coarsest(view.z, view.attention_output))
        )
        self.claims.append(Claim("label directions", view.index, error, allowed))

    def finish(self, end: End) -> dict[Any, torch.Tensor]:
        with torch.no_grad():
            return self._finish(end)

    def _finish(self, end: End) -> dict[Any, torch.Tensor]:
        n_layers = 1 + max(claim.layer or 0 for claim in self.claims)
        self._block(n_layers - 1, end.residual)
        if self.scales is not None:
            self._fitted(None, self.scales, self.scale_dtype, len(end.residual))
        if self.readout is not None:
            own = self.readout.on(end.residual.device)
            normed = own.frozen_norm(end.residual, own.spread(end.residual))
            found = own.label_logits(normed)
            expected = end.logits[:, self.readout.on(end.logits.device).label_ids]
            expected = expected.to(found.device)
            size = (normed.square() @ own.rows.T.square()).sqrt()
            error = ((found - expected).abs() / (size + expected.abs())).amax(dim=-1)
            allowed = torch.full_like(
                error, self.rounding.module(max(end.dtype, end.residual.dtype, key=roundoff))
            )
            self.claims.append(Claim("logits", None, error, allowed))
            for other in self.others:
                if other.final_logprobs is not None:
                    self._vocabulary(end, self.readout, other.final_logprobs, allowed)
        for other in self.others:
            self.claims += other.claims
        return _gathered(self.claims, end.residual.device)

    def _vocabulary(
        self,
        end: End,
        readout: Readout,
        found: Float32[torch.Tensor, "B label"],
        allowed: Float32[torch.Tensor, " B"],
    ) -> None:
        """Claim that the labels' log-probabilities agree, which depend on the whole vocabulary."""
        labels = end.logits[:, readout.on(end.logits.device).label_ids]
        low, high = end.logits.aminmax(dim=-1)
        # A few prompts at a time, to save memory.
        total = torch.cat([some.logsumexp(dim=-1) for some in end.logits.split(AT_ONCE)])
        expected = labels - total[:, None]
        size = torch.maximum(high, -low) + expected.abs().amax(dim=-1)
        both = torch.cat((expected, size[:, None]), dim=-1).to(found.device)
        error = (found - both[:, :-1]).abs().amax(dim=-1)
        self.claims.append(Claim("logits", None, error / both[:, -1], allowed))


class Proved(Recorder):
    """Recorder of donors that runs a proof too."""

    def __init__(self, recorder: Recorder, proof: Proof) -> None:
        self.recorder, self.proof = recorder, proof

    def layer(self, view: LayerView) -> None:
        self.recorder.layer(view)
        self.proof.layer(view)

    def finish(self, end: End) -> dict[Any, torch.Tensor]:
        self.proof.finish(end)
        return self.recorder.finish(end)


def _gathered(claims: Iterable[Claim], device: torch.device) -> dict[Any, torch.Tensor]:
    """Return errors and allowed errors (2, layer, B, *H), by identity and layers."""
    found: dict[str, dict[int | None, torch.Tensor]] = {}
    for claim in claims:
        both = torch.stack((claim.error, claim.allowed.expand_as(claim.error))).detach()
        layers = found.setdefault(claim.identity, {})
        known = layers.get(claim.layer)
        layers[claim.layer] = both if known is None else _worse(known, both)
    return {
        (name, tuple(layers)): torch.stack([x.float().to(device) for x in layers.values()], dim=1)
        for name, layers in found.items()
    }


def _worse(
    a: Float32[torch.Tensor, " 2 *rest"], b: Float32[torch.Tensor, " 2 *rest"]
) -> Float32[torch.Tensor, " 2 *rest"]:
    """Return the worse of two claims elementwise, by error over allowed error; NaN is worst."""
    b = b.to(a.device)
    worse = ~(b[0] * a[1] <= a[0] * b[1])
    return torch.where(worse, b, a)
