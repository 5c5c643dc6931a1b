"""Readout: label logits of a vector.

A label's direction is its unembedding row, pulled back through the final norm's scale (and
centring, if the norm centres) and through each head's output projection. The logit of a value
vector is its dot product with this direction, divided by the final norm's statistic at the last
position. If a norm lies between the head and the residual stream, the direction is pulled back
through it too, and its statistic at the last position divides as well. Biases are not assigned to
heads (see `label_logit` in `twotower/results/groups/heads.py`).

All directions are found by calling modules on probe vectors. So the readout also works for
quantized, offloaded and remote weights.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import nnsight
import torch
from jaxtyping import Float, Float32, Int, Shaped

from ..errors import ModelError
from ..models.measuring import measuring, probe_inputs, probing
from ..models.positions import softcapped
from ..models.wrapper import in_order
from .memory import UNEMBED_BYTES
from .norms import Norm, probe_norm
from .views import End, LayerView

if TYPE_CHECKING:
    from ..models import Architecture, Model
    from .everywhere import Everywhere

CACHE_BYTES = 1 << 21
"""Bytes of logits that fit into a CPU's cache."""

READOUT_BYTES = 1 << 30
"""Bytes of label directions that a model remembers; the newest are always kept. A label takes
half a megabyte in Llama-7B; `readouts.WINDOW_BYTES` bounds a single readout."""


@dataclass
class Readout:
    """Weights that map a vector to the labels' logits.

    Attributes
    ----------
    norm
        The final norm.
    post_norms
        (layer,) norms between attention and the residual stream; None without.
    multipliers
        (layer,) factors on what attention adds to the residual stream.
    factors
        (layer,) product of the factors on the stream from the end of each layer on.
    rows, bias
        (label, d_model) and (label,) the labels' unembedding rows and biases, times the model's
        factor on logits.
    softcap
        Softcap of the logits; None without. Label logits of vectors are taken before it.
    directions
        (layer,) of (head, d_head, label): the labels' directions pulled back to each head's z,
        before division by the norms' statistics; None for layers without heads.
    projection_bias, write_bias
        (layer, label) label logits of the biases of output projections and of norms after them,
        before division by the norms' statistics.
    label_ids
        (label,) token ids of the labels.

    Notes
    -----
    `at` returns the readout of prompts with their own answers. Its tensors by label have a dim for
    the prompt: rows (B, label, d_model), bias and label_ids (B, label),
    directions (B, head, d_head, label), projection_bias and write_bias (layer, B, label).
    """

    norm: Norm
    post_norms: list[Norm | None]
    multipliers: list[float]
    factors: Float[torch.Tensor, " layer"]
    rows: Float[torch.Tensor, "label d_model"]
    bias: Float[torch.Tensor, " label"]
    directions: list[Float[torch.Tensor, "head D label"] | None]
    projection_bias: Float[torch.Tensor, "layer label"]
    write_bias: Float[torch.Tensor, "layer label"]
    softcap: float | None
    label_ids: Int[torch.Tensor, " label"]
    _copies: dict[torch.device, Readout] = field(default_factory=dict, repr=False)

    def on(self, device: torch.device) -> Readout:
        """Return the readout with its tensors on a device; copies are made once."""
        if device == self.rows.device:
            return self
        if device not in self._copies:
            names = "factors rows bias projection_bias write_bias label_ids".split()
            moved: dict[str, Any] = {name: getattr(self, name).to(device) for name in names}
            moved["directions"] = [None if x is None else x.to(device) for x in self.directions]
            moved["post_norms"] = [None if x is None else x.on(device) for x in self.post_norms]
            self._copies[device] = replace(self, norm=self.norm.on(device), **moved, _copies={})
        return self._copies[device]

    def at(self, columns: Everywhere) -> Readout:
        """Return the readout of prompts whose answers are the labels at columns (B, label)."""
        copies = {device: own._picked(columns.on(device)) for device, own in self._copies.items()}
        return replace(self._picked(columns.own), _copies=copies)

    def _picked(self, columns: Int[torch.Tensor, "B label"]) -> Readout:
        directions = [
            None if x is None else x[:, :, columns].permute(2, 0, 1, 3) for x in self.directions
        ]
        return replace(
            self,
            rows=self.rows[columns],
            bias=self.bias[columns],
            directions=directions,
            projection_bias=self.projection_bias[:, columns],
            write_bias=self.write_bias[:, columns],
            label_ids=self.label_ids[columns],
            _copies={},
        )

    @property
    def heads_in(self) -> list[int]:
        """(layer,) number of heads."""
        return [0 if x is None else int(x.shape[-3]) for x in self.directions]

    @property
    def label_directions(self) -> Float[torch.Tensor, "*B label d_model"]:
        """Directions (label, d_model); `dot` with them over `spread` is a vector's label logit."""
        return self.norm.pull(self.rows)

    def spread(
        self, residual: Float[torch.Tensor, "*rest d_model"]
    ) -> Float32[torch.Tensor, "*rest"]:
        """Return the final norm's statistic (...,) of residuals (..., d_model), in float32."""
        return self.norm.statistic(residual)

    def write_spread(self, view: LayerView) -> Float32[torch.Tensor, " B"] | None:
        """Return the statistic (B,) of the norm after attention at the last position, or None."""
        norm = self.on(view.z.device).post_norms[view.index]
        assert view.attention_output is not None
        return None if norm is None else norm.statistic(view.attention_output[:, -1])

    def write(
        self, view: LayerView, output: Float[torch.Tensor, "B *rest d_model"]
    ) -> Float[torch.Tensor, "B *rest d_model"]:
        """Return what vectors add to the residual stream at the last position, without biases.

        Parameters
        ----------
        view
            The layer.
        output
            (B, ..., d_model) outputs of the projection, without its bias.
        """
        norm, spread = self.on(output.device).post_norms[view.index], self.write_spread(view)
        if norm is not None and spread is not None:
            output = norm.frozen(output, spread.view(-1, *[1] * (output.dim() - 2))) - norm.shift
        multiplier = self.multipliers[view.index]
        return output if multiplier == 1 else output * multiplier

    def label_logits(
        self, normed: Float[torch.Tensor, "*rest d_model"]
    ) -> Float32[torch.Tensor, "*rest label"]:
        """Return label logits (..., label) of normed vectors (..., d_model), with biases."""
        own = self.on(normed.device)
        found = dot(normed.float(), own.rows) + by_prompt(own.bias, normed)
        return softcapped(found, self.softcap)

    def of_labels(
        self, logits: Float[torch.Tensor, "B vocabulary"]
    ) -> Float[torch.Tensor, "B label"]:
        """Return the labels' logits (B, label) of the whole vocabulary's (B, vocabulary)."""
        ids = self.on(logits.device).label_ids
        return logits[:, ids] if ids.dim() == 1 else logits.gather(1, ids)

    def frozen_norm(
        self, x: Float[torch.Tensor, "*rest d_model"], spread: Float[torch.Tensor, "*#rest"]
    ) -> Float32[torch.Tensor, "*rest d_model"]:
        """Return the final norm of x (..., d_model) with a given statistic (...,)."""
        return self.on(x.device).norm.frozen(x, spread)

    def logprobs(
        self,
        normed: Float[torch.Tensor, "*rest d_model"],
        end: End,
        at_a_time: int | None = None,
    ) -> Float32[torch.Tensor, "*rest label"]:
        """Return the labels' log-probabilities (..., label) over the whole vocabulary, in float32.

        Unembeds a limited number of vectors at a time.
        """

        def tokens(device: torch.device) -> torch.Tensor:
            return by_prompt(self.on(device).label_ids, normed)

        return token_logprobs(normed, tokens, end, at_a_time)


def dot(
    vectors: Float[torch.Tensor, "B *rest d_model"],
    directions: Float[torch.Tensor, "*B label d_model"],
) -> Float[torch.Tensor, "B *rest label"]:
    """Return dot products with the directions of all prompts, or of each prompt (B, label, d)."""
    if directions.dim() == 2:
        return vectors @ directions.T
    flat = vectors.reshape(len(vectors), -1, vectors.shape[-1])
    return (flat @ directions.mT).reshape(*vectors.shape[:-1], -1)


def by_prompt(
    values: Shaped[torch.Tensor, "*B label"], like: Float[torch.Tensor, "B *rest d_model"]
) -> Shaped[torch.Tensor, "*B label"]:
    """Return values (label,), or (B, label) in a shape that broadcasts to (B, ..., label)."""
    return values if values.dim() == 1 else values.view(len(values), *[1] * (like.dim() - 2), -1)


def token_logprobs(
    normed: Float[torch.Tensor, "*rest d_model"],
    tokens: Callable[[torch.device], Int[torch.Tensor, "*few label"]],
    end: End,
    at_a_time: int | None = None,
) -> Float32[torch.Tensor, "*rest label"]:
    """Return log-probabilities (..., label) of tokens over the whole vocabulary, in float32.

    Parameters
    ----------
    normed
        (..., d_model) outputs of the final norm.
    tokens
        Returns token ids on a device: (label,), or in a shape that broadcasts to (..., label).
    end
        The end of the walk.
    at_a_time
        Number of vectors to unembed at a time.
    """
    n = at_a_time or max(1, UNEMBED_BYTES // (4 * end.logits.shape[-1]))
    flat = normed.flatten(0, -2).to(end.dtype)
    ids: list[torch.Tensor] = []

    def of_rows(start: int, some: torch.Tensor) -> torch.Tensor:  # a function, to free its logits
        logits: torch.Tensor = end.logits_of(end.unembedding(some)).float()
        if not ids:
            own = tokens(logits.device)
            many = own.dim() > 1
            ids.append(own.expand(*normed.shape[:-1], -1).flatten(0, -2) if many else own)
        if ids[0].dim() == 1:
            labels = logits[:, ids[0]]
        else:
            labels = logits.gather(1, ids[0][start : start + len(some)])
        return labels - logsumexp_(logits).unsqueeze(-1)

    found = [of_rows(number * n, some) for number, some in enumerate(flat.split(n))]
    whole: torch.Tensor = torch.cat(found).to(normed.device).unflatten(0, normed.shape[:-1])
    return whole


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
        inputs = probe_inputs(model)
        with in_order(model.name), probing(), torch.no_grad(), root.trace(**inputs):
            found = nnsight.save(_probe(architecture, root, ids))
        norms, factors, rows, bias, directions, biases, devices = found
        if not all(x is None or torch.isfinite(x).all() for x in directions):
            raise ModelError("the labels' directions are not finite; load the model in float32")
        made = [None if parts is None else Norm(*parts) for parts in norms]
        final = made.pop()
        assert final is not None
        readout = model.cache[key] = Readout(
            final,
            made,
            [architecture.write_multiplier(layer) for layer in range(architecture.n_layers)],
            factors,
            rows,
            bias,
            directions,
            biases[0],
            biases[1],
            architecture.logit_softcap,
            torch.tensor(ids),
        )
        # Copy now, so that no walk has to wait for the copies.
        for device in () if model.remote else devices:
            readout.on(torch.device(device))
        _forget_oldest(model)
    known: Readout = model.cache[key]
    return known


def bytes_per_label(model: Model) -> int:
    """Return the bytes of a label's directions in all layers."""
    return 4 * model.n_layers * model.n_heads * model.d_head


def _forget_oldest(model: Model) -> None:
    """Forget the oldest readouts as long as all together are too large."""
    known = [key for key in model.cache if key[0] == "readout"]
    sizes = [sum(x.nbytes for x in model.cache[key].directions if x is not None) for key in known]
    for number, key in enumerate(known[:-1]):
        if sum(sizes[number:]) > READOUT_BYTES:
            del model.cache[key]


def _probe(architecture: Architecture, root: Any, ids: list[int]) -> list[Any]:
    """Return the parts of a `Readout`, and the devices met. Only works inside a trace."""
    read = []
    for layer, block in enumerate(architecture.layers(root)):
        if architecture.has_heads(layer):
            z = architecture.projection(block).input
            norm = architecture.attention_post_norm(block)
            read.append((layer, block, z, None if norm is None else norm.output))
    norm, unembedding = architecture.final_norm(root), architecture.unembedding(root)
    stream = architecture.end(root)
    like = architecture.normed(root)  # on the norm's device, unlike its input
    normed_dtype = stream.dtype
    unembed_dtype = unembedding.input.dtype
    final = _parts(architecture, norm, like.to(normed_dtype))

    # The labels' unembedding rows, a few hundred elements at a time.
    step, width = 256, like.shape[-1]
    zero = torch.zeros(1, width, dtype=unembed_dtype, device=like.device)
    unembedded = unembedding(zero)
    bias = unembedded[0, ids].float()
    rows = []
    for start in range(0, width, step):
        n = min(step, width - start)
        probe = torch.zeros(n, width, dtype=unembed_dtype, device=like.device)
        probe.diagonal(start).fill_(1)
        rows.append((unembedding(probe)[:, ids].float() - bias).T)
    rows_by_label = torch.cat(rows, dim=1).to(like.device) * architecture.logit_multiplier
    bias = bias * architecture.logit_multiplier

    own_factors = [architecture.stream_factor(block) for block in architecture.layers(root)]
    # A user may have set another default dtype.
    ones = [1.0 if x is None else float(x) for x in own_factors]
    factors = torch.tensor(ones, dtype=torch.float32)
    factors = factors.flip(0).cumprod(dim=0).flip(0)
    pulled = _pulled(final, rows_by_label)
    norms: list[Any] = [None] * architecture.n_layers
    directions: list[Any] = [None] * architecture.n_layers
    biases = torch.zeros(2, architecture.n_layers, len(ids), dtype=torch.float32)
    for layer, block, z, written in read:
        scale = factors[layer] * architecture.write_multiplier(layer)
        projection, own = architecture.projection(block), pulled.to(z.device) * scale
        if written is not None:
            parts = _parts(architecture, architecture.attention_post_norm(block), written)
            norms[layer], biases[1, layer] = parts, (own @ parts[1]).cpu()
            own = _pulled(parts, own)
        eye = torch.eye(z.shape[-1], dtype=z.dtype, device=z.device)
        nothing = projection(torch.zeros_like(eye[:1]))
        weight = projection(eye) - nothing
        direction = weight.float() @ own.T
        biases[0, layer] = (nothing[0].float() @ own.T).cpu()
        directions[layer] = direction.unflatten(0, (architecture.heads_in(layer), -1)).cpu()
    met = [like.device, unembedded.device, *(z.device for _, _, z, _ in read)]
    return [
        [
            None if x is None else (x[0].cpu(), x[1].cpu(), bool(x[2]), x[3])
            for x in (*norms, final)
        ],
        factors,
        rows_by_label.cpu(),
        bias.cpu(),
        directions,
        biases.unbind(),
        list(dict.fromkeys(map(str, met))),
    ]


def _parts(architecture: Architecture, norm: Any, like: torch.Tensor) -> tuple[Any, ...]:
    """Return scale, shift, whether it centres, and epsilon of a norm. Only works inside a trace."""
    epsilon = architecture.epsilon(norm)
    return (*probe_norm(norm, like, epsilon), epsilon)


def _pulled(
    parts: tuple[Any, ...], directions: Float[torch.Tensor, "label d_model"]
) -> Float[torch.Tensor, "label d_model"]:
    scale, _, centred, _ = parts
    pulled = directions * scale
    return torch.where(centred, pulled - pulled.mean(dim=-1, keepdim=True), pulled)
