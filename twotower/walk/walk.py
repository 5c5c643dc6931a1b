"""One trace over the layers; every measure sees the same view of each layer.

A measure gives a *recorder* for each batch. The walk shows it every layer in turn and
then the end of the model; the recorder gives back tensors. Everything here runs inside
an nnsight trace, the same for local, sharded, quantized and remote models: modules are
called, no weight is read, and only torch is used.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
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
    """A property that is computed when it is first read.

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
    """What a layer computed on a batch of B prompts of T positions.

    Attributes
    ----------
    index
        Number of the layer.
    block
        nnsight's envoy of the block; its modules can be called.
    mask
        (B, T) boolean: what is no padding.
    residual
        (B, T, d_model) residual stream entering the block.
    query, key, value
        (B, T, H, d_head), (B, T, K, d_head) twice; before rotary.
    cos, sin
        (B or 1, T, 1, rotated) rotary tables, or None.
    z
        (B, T, H, d_head) heads' outputs before the output projection, after edits.
    own_z
        (B, T, H, d_head) the same as the model computed them, before edits.
    attention_output
        (B, T, d_model) the output projection's output.
    mlp_output
        (B, T, d_model).
    learned
        (B or 1, T, d_model) learned position embedding, where positions are not rotary.
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

    def rotate(
        self, x: Float[torch.Tensor, "B *S heads D"], positions: slice
    ) -> Float[torch.Tensor, "B *S heads D"]:
        """Rotary embedding of x (B, ..., S, heads, d_head) at S of the positions."""
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
        """(B, H, d_head) the last position's queries after rotary."""
        return self.rotate(self.query[:, -1:], slice(-1, None))[:, 0]

    def visible(self, n_queries: int = 1) -> Bool[torch.Tensor, "B {n_queries} T"]:
        """(B, n_queries, T) boolean: what the last positions may attend to."""
        return visible(self.real, n_queries, self.window)

    @property
    def real(self) -> Bool[torch.Tensor, "B T"]:
        """(B, T) boolean: what is no padding."""
        return self.mask.on(self.z.device)

    @property
    def window(self) -> int | None:
        """Number of positions a query sees, itself included; None for all."""
        return self.architecture.window(self.index)

    @once
    def scores(self) -> Float32[torch.Tensor, "B H T"]:
        """(B, H, T) float32 QK scores of the last position, scaled, unmasked."""
        return self.score(self.last_query, self.rotated_key)

    def score(
        self, query: Float[torch.Tensor, "B H D"], key: Float[torch.Tensor, "B T K D"]
    ) -> Float32[torch.Tensor, "B H T"]:
        """q.k times the model's scaling, in float32: (B, H, D) and (B, T, K, D) to (B, H, T)."""
        grouped = query.float().unflatten(1, (key.shape[2], -1))
        product = grouped @ key.float().permute(0, 2, 3, 1)
        scores: torch.Tensor = product.flatten(1, 2) * self.architecture.scaling(self.index)
        return scores

    @once
    def score_size(self) -> Float32[torch.Tensor, "B H"]:
        """(B, H) largest absolute score that the last position attends to."""
        scores: torch.Tensor = self.scores
        return scores.masked_fill(~self.visible(), 0).abs().amax(dim=-1)

    @once
    def attention(self) -> Float32[torch.Tensor, "B H T"]:
        """(B, H, T) float32 attention of the last position."""
        scores: torch.Tensor = self.scores
        return scores.masked_fill(~self.visible(), -torch.inf).softmax(dim=-1)

    @once
    def content(
        self,
    ) -> tuple[Float[torch.Tensor, "B T H D"], Float[torch.Tensor, "B T K D"]]:
        """(B, T, H, D), (B, T, K, D) queries and keys without the learned position's path.

        That path leads through the attention's norm. The norm's weight is not read: the
        norm of the embedding alone, less its bias, is the weighted, centred embedding over
        the embedding's own deviation.
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
    """(B, n_queries, T) boolean: which of T positions the last n_queries may attend to.

    A padded query sees itself alone, so that no row of a softmax is empty.
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
    """What stands after the last layer.

    Attributes
    ----------
    residual
        (B, d_model) residual stream of the last position, entering the final norm.
    logits
        (B, vocabulary) float32, of the last position: the model's own answer.
    final_norm, unembedding
        Envoys that can be called.
    dtype
        What the unembedding takes.
    """

    residual: Float[torch.Tensor, "B d_model"]
    logits: Float32[torch.Tensor, "B vocabulary"]
    final_norm: Any
    unembedding: Any
    dtype: torch.dtype


class Recorder:
    """Takes from a walk what a measure is made of; one per batch."""

    group: str = ""
    """Group of the schema that names the results."""

    readout: Any = None
    """The labels' readout, if it uses one; it is proved beside."""

    final_logprobs: torch.Tensor | None = None
    """(B, label) the clean run's log-probabilities as it makes them, if it makes any."""

    claims: Sequence[Any] = ()
    """Claims of its own about the batch (`twotower.walk.proof`)."""

    donors: Sequence[Donors] = ()
    """Other prompts that are run before the batch."""

    shares_rows: bool = False
    """Whether a value of one prompt that is not finite may reach other prompts' values."""

    def layer(self, view: LayerView) -> None:
        """Called at every layer, in order."""

    def finish(self, end: End) -> dict[str, torch.Tensor]:
        """Called after the last layer; gives the batch's results."""
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
    """Prompts that are run before a batch, since something of theirs is put into it.

    Attributes
    ----------
    batch
        The prompts.
    recorder
        Takes what is wanted; what uses it holds on to the recorder's own results.
    """

    batch: Batch
    recorder: Recorder


class BatchEdit:
    """An edit made ready for a batch."""

    donors: Sequence[Donors] = ()
    """Other prompts that are run before the batch."""

    def apply(
        self, view: LayerView, z: Float[torch.Tensor, "B T H D"]
    ) -> Float[torch.Tensor, "B T H D"]:
        """The edited z of a layer; z itself where the layer is not concerned."""
        raise NotImplementedError


def walk(
    architecture: Architecture,
    root: Any,
    mask: Everywhere,
    recorders: Sequence[Recorder],
    edits: Sequence[BatchEdit] = (),
    gradients: bool = False,
) -> list[dict[Any, torch.Tensor]]:
    """Show every layer to every recorder. Only works inside a trace of `root`.

    Values are read in the order in which the model makes them, as nnsight requires. With
    `gradients` the graph begins at the first layer, and every z stands in it.
    """
    embedding = architecture.learned_positions(root)
    learned = None if embedding is None else Everywhere(embedding.output, ())
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
        # Read before accelerate brings it to the layer's own device.
        residual = residual.to(z.device)
        parts = (residual, query, key, value, cos, sin, z, z)
        view = LayerView(architecture, index, block, mask, *parts, learned=learned)
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
    # The model's own answer, which accelerate has brought to where the tokens came from.
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
    """What recorders take from a forward of a batch, brought to the CPU.

    The donors' forwards come first. All of it is one session, which a server runs as one
    job; what donors give does not leave it.
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
    """Other prompts that are run before a batch."""
    of_edits = [donors for edit in edits for donors in edit.donors]
    return of_edits + [donors for recorder in recorders for donors in recorder.donors]


def on_host(results: Sequence[dict[Any, torch.Tensor]]) -> list[dict[Any, torch.Tensor]]:
    """Results brought to the CPU: all copies are under way before one is waited for."""
    found = [{k: x.to("cpu", non_blocking=True) for k, x in result.items()} for result in results]
    for device in {x.device for result in results for x in result.values()}:
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
    return found
