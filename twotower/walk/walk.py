"""The walk: one trace over the layers, in which every measure sees the same view of each layer.

A measure makes a *recorder* for each batch. The walk passes every layer to the recorder, then
the end of the model; the recorder returns tensors. All of this runs inside an nnsight trace, in
the same way for local, sharded, quantized and remote models. The code calls modules, reads no
weights, and uses only torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import nnsight
import torch
from jaxtyping import Bool, Float, Float32

from ..models.remote import reached
from .batch import Batch
from .everywhere import Everywhere

if TYPE_CHECKING:
    from ..models import Architecture, Model


def once(function: Callable[[Any], Any]) -> Any:
    """Return a property that is computed at first access and then stored.

    `functools.cached_property` holds a lock, which cannot be sent to a server.
    """
    name = f"_{function.__name__}"

    def read(self: Any) -> Any:
        if name not in self.__dict__:
            self.__dict__[name] = function(self)
        return self.__dict__[name]

    return property(read, doc=function.__doc__)


@dataclass
class LayerView:
    """Tensors of a layer, for a batch of B prompts of T positions.

    Attributes
    ----------
    index
        Number of the layer.
    block
        nnsight's envoy of the block; its modules can be called.
    mask
        (B, T) boolean: True for tokens, False for padding.
    residual
        (B, T, d_model) residual stream entering the block.
    query, key, value
        (B, T, H, d_head) queries, (B, T, K, d_head) keys and values; before rotary.
    cos, sin
        (B or 1, T, 1, rotated) rotary tables, or None.
    z
        (B, T, H, d_head) heads' outputs before the output projection, after edits.
    own_z
        (B, T, H, d_head) heads' outputs before edits, as computed by the model.
    attention_output
        (B, T, d_model) output of the output projection.
    mlp_output
        (B, T, d_model) output of the MLP.
    learned
        (B or 1, T, d_model) learned position embedding, or None.
    masks
        Masks of visible and hidden keys by device, number of queries and window; all layers
        share them.
    """

    architecture: Architecture
    index: int
    block: Any
    mask: Everywhere
    residual: Float[torch.Tensor, "B T d_model"]
    query: Float[torch.Tensor, "B T H D"]
    key: Float[torch.Tensor, "B T K D"]
    value: Float[torch.Tensor, "B T K D"]
    cos: Float[torch.Tensor, "#B T 1 rotated"] | None
    sin: Float[torch.Tensor, "#B T 1 rotated"] | None
    z: Float[torch.Tensor, "B T H D"]
    own_z: Float[torch.Tensor, "B T H D"]
    attention_output: Float[torch.Tensor, "B T d_model"] | None = None
    mlp_output: Float[torch.Tensor, "B T d_model"] | None = None
    learned: Everywhere | None = None
    masks: dict[Any, torch.Tensor] = field(default_factory=dict)

    def rotate(
        self, x: Float[torch.Tensor, "B *S heads D"], positions: slice
    ) -> Float[torch.Tensor, "B *S heads D"]:
        """Return x (B, ..., S, heads, d_head) with the rotary embedding of S positions applied."""
        if self.cos is None or self.sin is None:
            return x
        cos, sin = self.cos[:, positions], self.sin[:, positions]
        while cos.dim() < x.dim():
            cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
        return self.architecture.rotate(x, cos.to(x.dtype), sin.to(x.dtype))

    @once
    def rotated_key(self) -> Float[torch.Tensor, "B T K D"]:
        """(B, T, K, d_head) keys after rotary."""
        return self.rotate(self.key, slice(None))

    @once
    def last_query(self) -> Float[torch.Tensor, "B H D"]:
        """(B, H, d_head) queries of the last position after rotary."""
        return self.rotate(self.query[:, -1:], slice(-1, None))[:, 0]

    def visible(self, n_queries: int = 1) -> Bool[torch.Tensor, "B {n_queries} T"]:
        """Return (B, n_queries, T) boolean: keys visible to the last n_queries positions."""
        key = (self.z.device, n_queries, self.window)
        if key not in self.masks:
            self.masks[key] = visible(self.real, n_queries, self.window)
        return self.masks[key]

    def hidden(self, n_queries: int = 1) -> Bool[torch.Tensor, "B {n_queries} T"]:
        """Return (B, n_queries, T) boolean: keys hidden from the last n_queries positions."""
        key = (self.z.device, n_queries, self.window, "hidden")
        if key not in self.masks:
            self.masks[key] = ~self.visible(n_queries)
        return self.masks[key]

    @property
    def real(self) -> Bool[torch.Tensor, "B T"]:
        """(B, T) boolean: True for tokens, False for padding."""
        return self.mask.on(self.z.device)

    @property
    def window(self) -> int | None:
        """Number of positions that a query sees, including itself; None for all."""
        return self.architecture.window(self.index)

    @once
    def scores(self) -> Float32[torch.Tensor, "B H T"]:
        """(B, H, T) float32 QK scores of the last position, scaled, unmasked."""
        return self.score(self.last_query, self.rotated_key)

    def score(
        self, query: Float[torch.Tensor, "B H D"], key: Float[torch.Tensor, "B T K D"]
    ) -> Float32[torch.Tensor, "B H T"]:
        """Return scaled q.k in float32: (B, H, D) and (B, T, K, D) to (B, H, T)."""
        grouped = query.float().unflatten(1, (key.shape[2], -1))
        product = grouped @ key.float().permute(0, 2, 3, 1)
        scores: torch.Tensor = product.flatten(1, 2) * self.architecture.scaling(self.index)
        return scores

    @once
    def visible_scores(self) -> Float32[torch.Tensor, "B H T"]:
        """(B, H, T) scores of the last position, 0 at keys that it does not see."""
        scores: torch.Tensor = self.scores
        return scores.masked_fill(self.hidden(), 0)

    @once
    def score_size(self) -> Float32[torch.Tensor, "B H"]:
        """(B, H) largest absolute score of the last position at a visible key."""
        scores: torch.Tensor = self.visible_scores
        return scores.abs().amax(dim=-1)

    @once
    def attention(self) -> Float32[torch.Tensor, "B H T"]:
        """(B, H, T) float32 attention weights of the last position."""
        scores: torch.Tensor = self.scores
        return scores.masked_fill(self.hidden(), -torch.inf).softmax(dim=-1)

    @once
    def content(
        self,
    ) -> tuple[Float[torch.Tensor, "B T H D"], Float[torch.Tensor, "B T K D"]]:
        """(B, T, H, D), (B, T, K, D) queries and keys without the learned position embedding.

        The position embedding's part of the attention norm's output is subtracted. To compute
        this part without reading weights, the norm is called on the embedding. The result minus
        the norm's bias is the weighted, centred embedding over the embedding's own standard
        deviation, which is then rescaled to that of the residual stream.
        """
        assert self.learned is not None
        architecture, norm = self.architecture, self.architecture.attention_norm(self.block)
        embedding = self.learned.on(self.residual.device).to(self.residual.dtype)
        direct = (norm(embedding) - norm(torch.zeros_like(embedding[:, :1]))).float()
        deviation = [
            (x.float().var(dim=-1, keepdim=True, unbiased=False) + architecture.norm_epsilon).sqrt()
            for x in (embedding, self.residual)
        ]
        content = norm(self.residual).float() - direct * deviation[0] / deviation[1]
        content = content.to(self.residual.dtype)
        projected = [module(content) for module in architecture.qkv(self.block)]
        query, key, _ = architecture.split(self.block, projected)
        return query, key


def visible(
    mask: Bool[torch.Tensor, "B T"], n_queries: int, window: int | None
) -> Bool[torch.Tensor, "B {n_queries} T"]:
    """Return (B, n_queries, T) boolean: keys visible to the last n_queries positions.

    Every query sees itself, even at padding, so that no row of the softmax is empty.
    """
    width = mask.shape[1]
    columns = torch.arange(width, device=mask.device)
    queries = columns[width - n_queries :, None]
    seen = columns <= queries
    if window is not None:
        seen &= queries - columns < window
    return (seen & mask[:, None]) | (columns == queries)


@dataclass
class End:
    """Tensors and modules after the last layer.

    Attributes
    ----------
    residual
        (B, d_model) residual stream of the last position, entering the final norm.
    logits
        (B, vocabulary) float32 logits of the last position, as computed by the model.
    final_norm, unembedding
        Envoys that can be called.
    dtype
        Input dtype of the unembedding.
    """

    residual: Float[torch.Tensor, "B d_model"]
    logits: Float32[torch.Tensor, "B vocabulary"]
    final_norm: Any
    unembedding: Any
    dtype: torch.dtype


class Recorder:
    """Records the tensors that a measure needs from a walk; one recorder for each batch."""

    group: str = ""
    """Group of the schema that names the results."""

    readout: Any = None
    """Readout of the labels, if the recorder uses one; the proof checks it."""

    final_logprobs: torch.Tensor | None = None
    """(B, label) log-probabilities of the clean run, if the recorder computes them."""

    claims: Sequence[Any] = ()
    """The recorder's own claims about the batch (`twotower.walk.proof`)."""

    donors: Sequence[Donors] = ()
    """Donors to run before the batch."""

    shares_rows: bool = False
    """Whether values that are not finite in one prompt may reach other prompts."""

    def layer(self, view: LayerView) -> None:
        """Record a layer; called for every layer, in order."""

    def finish(self, end: End) -> dict[str, torch.Tensor]:
        """Return the batch's results; called after the last layer."""
        return {}


class Together(Recorder):
    """Several recorders whose results belong to one group."""

    def __init__(self, recorders: Sequence[Recorder]) -> None:
        self.recorders = recorders
        self.group = recorders[0].group
        self.readout = recorders[0].readout

    def layer(self, view: LayerView) -> None:
        for recorder in self.recorders:
            recorder.layer(view)

    def finish(self, end: End) -> dict[str, torch.Tensor]:
        return {k: x for recorder in self.recorders for k, x in recorder.finish(end).items()}


@dataclass
class Donors:
    """Prompts that run before a batch and whose activations are put into it.

    Attributes
    ----------
    batch
        Batch of the donor prompts.
    recorder
        Recorder of the activations. The edit that uses them reads them from the recorder.
    """

    batch: Batch
    recorder: Recorder


class BatchEdit:
    """An edit prepared for a batch."""

    donors: Sequence[Donors] = ()
    """Donors to run before the batch."""

    def apply(
        self, view: LayerView, z: Float[torch.Tensor, "B T H D"]
    ) -> Float[torch.Tensor, "B T H D"]:
        """Return the edited z of a layer, or z itself if the layer is not edited."""
        raise NotImplementedError


def walk(
    architecture: Architecture,
    root: Any,
    mask: Everywhere,
    recorders: Sequence[Recorder],
    edits: Sequence[BatchEdit] = (),
    gradients: bool = False,
) -> list[dict[Any, torch.Tensor]]:
    """Pass every layer to every recorder and return the results. Only works in a trace of `root`.

    Values are read in the order in which the model computes them, as nnsight requires. With
    `gradients`, the autograd graph starts at the first layer and contains every z.
    """
    embedding = architecture.learned_positions(root)
    learned = None if embedding is None else Everywhere(embedding.output, ())
    masks: dict[Any, torch.Tensor] = {}
    for index, block in enumerate(architecture.layers(root)):
        residual = block.input
        if gradients and index == 0:
            residual = residual.detach().requires_grad_()
            block.input = residual
        attention = architecture.attention(block)
        tables = architecture.rotary_tables(attention)
        projected = [module.output for module in architecture.qkv(block)]
        query, key, value = architecture.split(block, projected)
        projection = architecture.projection(block)
        z = projection.input.unflatten(-1, (architecture.n_heads, -1))
        cos, sin = (None, None) if tables is None else (t.unsqueeze(-2) for t in tables)
        # It was read before accelerate moved it to the layer's device.
        residual = residual.to(z.device)
        parts = (residual, query, key, value, cos, sin, z, z)
        view = LayerView(architecture, index, block, mask, *parts, learned=learned, masks=masks)
        for edit in edits:
            edited = edit.apply(view, view.z)
            if edited is not view.z:
                view.z = edited
                projection.input = edited.flatten(-2)
        if gradients:
            projection.input = view.z.flatten(-2)
        view.attention_output = projection.output
        view.mlp_output = architecture.mlp(block).output
        for recorder in recorders:
            recorder.layer(view)
    final_norm, unembedding = architecture.final_norm(root), architecture.unembedding(root)
    residual, device = final_norm.input[:, -1], final_norm.output.device
    dtype = unembedding.input.dtype
    # accelerate has moved these logits to the device of the tokens.
    logits = root.output.logits[:, -1].float()
    end = End(residual.to(device), logits, final_norm, unembedding, dtype)
    return [recorder.finish(end) for recorder in recorders]


def run_batch(
    model: Model,
    batch: Batch,
    recorders: Sequence[Recorder],
    edits: Sequence[BatchEdit] = (),
    *,
    gradients: bool = False,
    on_cpu: bool = True,
) -> list[dict[Any, torch.Tensor]]:
    """Run a batch and return the recorders' results, by default on the CPU.

    The donors' forwards run first. All forwards form one session, which a server runs as one
    job. The donors' activations do not leave the session.
    """
    architecture, root, inputs, mask = model.architecture, model.traced, batch.inputs, batch.mask
    before = [
        (donors.batch.inputs, donors.batch.mask, [donors.recorder])
        for donors in donors_of(edits, recorders)
    ]
    where = {"remote": model.remote} if model.remote else {}
    with reached(model.remote), root.session(**where):
        with torch.no_grad():
            for their_inputs, their_mask, recorder in before:
                with root.trace(**their_inputs):
                    walk(architecture, root, their_mask, recorder)
        with torch.set_grad_enabled(gradients), root.trace(**inputs):
            results = nnsight.save(walk(architecture, root, mask, recorders, edits, gradients))
    return on_host(results) if on_cpu else list(results)


def donors_of(edits: Sequence[BatchEdit], recorders: Sequence[Recorder]) -> list[Donors]:
    """Return the donors to run before a batch."""
    of_edits = [donors for edit in edits for donors in edit.donors]
    return of_edits + [donors for recorder in recorders for donors in recorder.donors]


def on_host(results: Sequence[dict[Any, torch.Tensor]]) -> list[dict[Any, torch.Tensor]]:
    """Return results on the CPU; starts all copies before waiting for them."""
    found = [{k: x.to("cpu", non_blocking=True) for k, x in result.items()} for result in results]
    for device in {x.device for result in results for x in result.values()}:
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
    return found
