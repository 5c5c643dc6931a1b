"""Readout: label logits of a vector.

A label's direction is its unembedding row, pulled back through the final norm's scale (and
centring, if the norm centres) and through each head's output projection. The logit of a value
vector is its dot product with this direction, divided by the final norm's statistic at the last
position. Biases are not assigned to heads (see "label logit" in the glossary of
`twotower.results.schema`).

All directions are found by calling modules on probe vectors. So the readout also works for
quantized, offloaded and remote weights.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import nnsight
import torch
from jaxtyping import Float, Float32, Int

from ..errors import ModelError
from ..models.measuring import measuring
from .memory import UNEMBED_BYTES
from .walk import End

if TYPE_CHECKING:
    from ..models import Architecture, Model

CACHE_BYTES = 1 << 21
"""Bytes of logits that fit into a CPU's cache."""


@dataclass
class Readout:
    """Weights that map a vector to the labels' logits.

    Attributes
    ----------
    scale, shift
        (d_model,) the final norm's weight and bias.
    centred
        Whether the final norm subtracts the mean.
    rows, bias
        (label, d_model) and (label,) the labels' unembedding rows and biases.
    directions
        (layer, head, d_head, label) the labels' directions pulled back to each head's z.
    projection_bias
        (layer, label) label logits of the output projections' biases, before division by the
        norm's statistic.
    label_ids
        (label,) token ids of the labels.
    """

    scale: Float[torch.Tensor, " d_model"]
    shift: Float[torch.Tensor, " d_model"]
    centred: bool
    epsilon: float
    rows: Float[torch.Tensor, "label d_model"]
    bias: Float[torch.Tensor, " label"]
    directions: Float[torch.Tensor, "layer head D label"]
    projection_bias: Float[torch.Tensor, "layer label"]
    label_ids: Int[torch.Tensor, " label"]
    _copies: dict[torch.device, Readout] = field(default_factory=dict, repr=False)

    def on(self, device: torch.device) -> Readout:
        """Return the readout with its tensors on a device; copies are made once."""
        if device == self.rows.device:
            return self
        if device not in self._copies:
            names = "scale shift rows bias directions projection_bias label_ids".split()
            moved = {name: getattr(self, name).to(device) for name in names}
            self._copies[device] = replace(self, **moved, _copies={})
        return self._copies[device]

    @property
    def label_directions(self) -> Float[torch.Tensor, "label d_model"]:
        """(label, d_model) directions; a vector's dot product over `spread` is its label logit."""
        pulled = self.rows * self.scale
        return pulled - pulled.mean(dim=-1, keepdim=True) if self.centred else pulled

    def spread(
        self, residual: Float[torch.Tensor, "*rest d_model"]
    ) -> Float32[torch.Tensor, "*rest"]:
        """Return the final norm's statistic (...,) of residuals (..., d_model), in float32."""
        x = residual.float()
        if self.centred:
            x = x - x.mean(dim=-1, keepdim=True)
        return (x.square().mean(dim=-1) + self.epsilon).sqrt()

    def label_logits(
        self, normed: Float[torch.Tensor, "*rest d_model"]
    ) -> Float32[torch.Tensor, "*rest label"]:
        """Return label logits (..., label) of normed vectors (..., d_model), with biases."""
        own = self.on(normed.device)
        return normed.float() @ own.rows.T + own.bias

    def frozen_norm(
        self, x: Float[torch.Tensor, "*rest d_model"], spread: Float[torch.Tensor, "*#rest"]
    ) -> Float32[torch.Tensor, "*rest d_model"]:
        """Return the final norm of x (..., d_model) with a given statistic (...,)."""
        x = x.float()
        if self.centred:
            x = x - x.mean(dim=-1, keepdim=True)
        own = self.on(x.device)
        return x / spread.unsqueeze(-1) * own.scale + own.shift

    def logprobs(
        self,
        normed: Float[torch.Tensor, "*rest d_model"],
        end: End,
        at_a_time: int | None = None,
    ) -> Float32[torch.Tensor, "*rest label"]:
        """Return the labels' log-probabilities (..., label) over the whole vocabulary, in float32.

        Unembeds a limited number of vectors at a time.
        """
        n = at_a_time or max(1, UNEMBED_BYTES // (4 * end.logits.shape[-1]))
        flat = normed.flatten(0, -2).to(end.dtype)
        found = torch.cat([self._logprobs(some, end) for some in flat.split(n)])
        whole: torch.Tensor = found.to(normed.device).unflatten(0, normed.shape[:-1])
        return whole

    def _logprobs(
        self, normed: Float[torch.Tensor, "n d_model"], end: End
    ) -> Float32[torch.Tensor, "n label"]:
        """Return log-probabilities (n, label) of normed vectors (n, d_model)."""
        logits: torch.Tensor = end.unembedding(normed).float()
        labels = logits[:, self.on(logits.device).label_ids]
        return labels - logsumexp_(logits).unsqueeze(-1)


def logsumexp_(logits: Float[torch.Tensor, "n vocabulary"]) -> Float[torch.Tensor, " n"]:
    """Return the log-sum-exp (n,) of logits (n, vocabulary), and overwrite the logits.

    On a CPU, processes a few rows at a time. They then stay in the cache between maximum,
    exponentials and sum, which takes a quarter of the time.
    """
    found = []
    rows = max(1, CACHE_BYTES // (4 * logits.shape[-1]))
    for block in logits.split(len(logits) if logits.is_cuda else rows):
        most = block.amax(dim=-1, keepdim=True)
        found.append(block.sub_(most).exp_().sum(dim=-1).log_() + most[:, 0])
    return torch.cat(found)


def get_readout(model: Model, label_ids: tuple[int, ...]) -> Readout:
    """Return the readout of some labels, made once per model.

    Parameters
    ----------
    model
        Model, whose modules are called on probe vectors in one short trace.
    label_ids
        Token ids of the labels.
    """
    key = ("readout", label_ids)
    with measuring(model):
        return _get_readout(model, key, list(label_ids))


def _get_readout(model: Model, key: tuple[Any, ...], ids: list[int]) -> Readout:
    if key not in model.cache:
        architecture, root = model.architecture, model.traced
        token = torch.zeros((1, 1), dtype=torch.long, device=model.device)
        where = {"remote": model.remote} if model.remote else {}
        inputs = {"input_ids": token, "attention_mask": torch.ones_like(token)}
        with torch.no_grad(), root.trace(**inputs, use_cache=False, return_dict=True, **where):
            found = nnsight.save(_probe(architecture, root, ids))
        scale, shift, centred, rows, bias, directions, projection_bias, devices = found
        if not torch.isfinite(directions).all():
            raise ModelError("the labels' directions are not finite; load the model in float32")
        readout = model.cache[key] = Readout(
            scale,
            shift,
            bool(centred),
            architecture.norm_epsilon,
            rows,
            bias,
            directions,
            projection_bias,
            torch.tensor(ids),
        )
        # Copy now, so that no walk has to wait for the copies.
        for device in () if model.remote else devices:
            readout.on(torch.device(device))
    known: Readout = model.cache[key]
    return known


def _probe(architecture: Architecture, root: Any, ids: list[int]) -> list[Any]:
    """Return the parts of a `Readout`, and the devices met. Only works inside a trace."""
    projection_like = [architecture.projection(b).input for b in architecture.layers(root)]
    norm, unembedding = architecture.final_norm(root), architecture.unembedding(root)
    normed_dtype = norm.input.dtype
    like = norm.output  # on the norm's device, as accelerate may bring its input there
    unembed_dtype = unembedding.input.dtype

    width = like.shape[-1]
    zero = torch.zeros(1, width, dtype=normed_dtype, device=like.device)
    # The norm maps a vector of mean 0 and variance 1 to plus and minus its weight, whether it
    # centres or not. It maps a vector of ones to its bias only if it centres.
    signs = torch.ones_like(zero)
    signs[:, 1::2] = -1
    root_epsilon = (1 + architecture.norm_epsilon) ** 0.5
    shift = norm(zero).float()[0]
    scale = (norm(signs).float()[0] - shift) * signs[0].float() * root_epsilon
    centred = (norm(torch.ones_like(zero)).float()[0] - shift).abs().max() < 0.1 * scale.abs().max()

    # The labels' unembedding rows, a few hundred elements at a time.
    step = 256
    unembedded = unembedding(zero.to(unembed_dtype))
    bias = unembedded[0, ids].float()
    rows = []
    for start in range(0, width, step):
        n = min(step, width - start)
        probe = torch.zeros(n, width, dtype=unembed_dtype, device=like.device)
        probe.diagonal(start).fill_(1)
        rows.append((unembedding(probe)[:, ids].float() - bias).T)
    rows_by_label = torch.cat(rows, dim=1).to(scale.device)

    pulled = rows_by_label * scale
    pulled = torch.where(centred, pulled - pulled.mean(dim=-1, keepdim=True), pulled)
    directions, biases = [], []
    for z, block in zip(projection_like, architecture.layers(root), strict=True):
        projection = architecture.projection(block)
        eye = torch.eye(z.shape[-1], dtype=z.dtype, device=z.device)
        nothing = projection(torch.zeros_like(eye[:1]))
        weight = projection(eye) - nothing
        direction = weight.float() @ pulled.T.to(weight.device)
        biases.append((nothing[0].float() @ pulled.T.to(weight.device)).cpu())
        directions.append(direction.unflatten(0, (architecture.n_heads, -1)).cpu())
    met = [like.device, unembedded.device, *(z.device for z in projection_like)]
    return [
        scale.cpu(),
        shift.cpu(),
        centred.cpu(),
        rows_by_label.cpu(),
        bias.cpu(),
        torch.stack(directions),
        torch.stack(biases),
        list(dict.fromkeys(map(str, met))),
    ]
