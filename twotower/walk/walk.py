"""The walk: one trace over the layers, in which every measure sees the same view of each layer.

A measure makes a *recorder* for each batch. The walk passes every layer to the recorder, then
the end of the model; the recorder returns tensors. All of this runs inside an nnsight trace, in
the same way for local, sharded, quantized and remote models. The code calls modules, reads no
weights, and uses only torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import nnsight
import torch
from jaxtyping import Bool, Float, Float32, Int

from ..models.positions import Positions, visible
from ..models.remote import reached
from .batch import Batch
from .everywhere import Everywhere
from .last import LastAttention
from .once import once

if TYPE_CHECKING:
    from ..models import Architecture, Model


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
        (B, T, H, d_key) queries, (B, T, K, d_key) keys, (B, T, K, d_head) values; before rotary.
    positions
        Tensors by which the scores depend on positions, such as rotary tables.
    z
        (B, T, H, d_head) heads' outputs before the output projection, after gates and edits.
    own_z
        (B, T, H, d_head) heads' outputs before edits, as computed by the model.
    gate
        (B, T, H, d_head or 1) factor on the heads' outputs, included in z; None without.
    sinks
        (H,) score of the heads' sinks; None without.
    attention_output
        (B, T, d_model) output of the output projection.
    attention_write, mlp_write
        (B, T, d_model) what attention and MLP add to the residual stream; the latter is 0 without
        an MLP.
    mixer_write
        (B, T, d_model) what a mixer of positions without heads adds; None without.
    more_input, more_write
        (B, T, ...) what the end of the block reads besides the stream, and (B, T, d_model) what
        it adds after the MLP; None without.
    factor
        Factor on the residual stream that leaves the block; None without.
    learned
        (B or 1, T, d_model) learned position embedding, or None.
    entered
        (B, T, d_model) residual stream before edits of the stream; None without.
    masks
        Masks of visible and hidden keys by device, number of queries, window and chunk; all
        layers share them.
    """

    architecture: Architecture
    index: int
    block: Any
    mask: Everywhere
    residual: Float[torch.Tensor, "B T d_model"]
    query: Float[torch.Tensor, "B T H d_key"]
    key: Float[torch.Tensor, "B T K d_key"]
    value: Float[torch.Tensor, "B T K D"]
    positions: Positions
    z: Float[torch.Tensor, "B T H D"]
    own_z: Float[torch.Tensor, "B T H D"]
    gate: Float[torch.Tensor, "B T H gated"] | None = None
    sinks: Float[torch.Tensor, " H"] | None = None
    attention_output: Float[torch.Tensor, "B T d_model"] | None = None
    attention_write: Float[torch.Tensor, "B T d_model"] | None = None
    mlp_write: Float[torch.Tensor, "B T d_model"] | None = None
    mixer_write: Float[torch.Tensor, "B T d_model"] | None = None
    more_input: Float[torch.Tensor, "B T *features"] | None = None
    more_write: Float[torch.Tensor, "B T d_model"] | None = None
    factor: Float[torch.Tensor, ""] | None = None
    learned: Everywhere | None = None
    entered: Float[torch.Tensor, "B T d_model"] | None = None
    masks: dict[Any, torch.Tensor] = field(default_factory=dict)

    def turn(
        self, x: Float[torch.Tensor, "B S heads d_key"], positions: slice, *, query: bool
    ) -> Float[torch.Tensor, "B S heads d_key"]:
        """Return queries or keys at S positions as they are multiplied, with rotary embedding."""
        at = self.positions.tables(lambda table: table[:, positions])
        return self.architecture.turn(self.block, x, at, query=query)

    @once
    def last(self) -> LastAttention:
        """Attention of the last position."""
        return LastAttention(
            self.architecture,
            self.index,
            self.block,
            self.query[:, -1],
            self.key,
            self.value,
            self.positions,
            self.hidden(),
            None if self.gate is None else self.gate[:, -1],
            self.sinks,
        )

    @property
    def turned_key(self) -> Float[torch.Tensor, "B T K d_key"]:
        """(B, T, K, d_key) keys after rotary."""
        return self.last.turned_key

    def visible(self, n_queries: int = 1) -> Bool[torch.Tensor, "B {n_queries} T"]:
        """Return (B, n_queries, T) boolean: keys visible to the last n_queries positions."""
        reach = (self.architecture.window(self.index), self.architecture.chunk(self.index))
        key = (self.z.device, n_queries, reach)
        if key not in self.masks:
            self.masks[key] = visible(self.real, n_queries, *reach)
        return self.masks[key]

    def hidden(self, n_queries: int = 1) -> Bool[torch.Tensor, "B {n_queries} T"]:
        """Return (B, n_queries, T) boolean: keys hidden from the last n_queries positions."""
        reach = (self.architecture.window(self.index), self.architecture.chunk(self.index))
        key = (self.z.device, n_queries, reach, "hidden")
        if key not in self.masks:
            self.masks[key] = ~self.visible(n_queries)
        return self.masks[key]

    @property
    def real(self) -> Bool[torch.Tensor, "B T"]:
        """(B, T) boolean: True for tokens, False for padding."""
        return self.mask.on(self.z.device)

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
        assert norm is not None
        embedding = self.learned.on(self.residual.device).to(self.residual.dtype)
        direct = (norm(embedding) - norm(torch.zeros_like(embedding[:, :1]))).float()
        deviation = [
            (
                x.float().var(dim=-1, keepdim=True, unbiased=False) + architecture.epsilon(norm)
            ).sqrt()
            for x in (embedding, self.residual)
        ]
        content = norm(self.residual).float() - direct * deviation[0] / deviation[1]
        content = content.to(self.residual.dtype)
        projected = [module(content) for module in architecture.qkv(self.block)]
        query, key, _ = architecture.split(self.block, projected)
        return query, key


@dataclass
class PassingView:
    """Tensors of a layer without heads.

    Attributes
    ----------
    index, block, mask, residual, entered
        As of `LayerView`.
    mixer_write, mlp_write
        (B, T, d_model) what mixer and MLP add to the residual stream; 0 without.
    """

    architecture: Architecture
    index: int
    block: Any
    mask: Everywhere
    residual: Float[torch.Tensor, "B T d_model"]
    mixer_write: Float[torch.Tensor, "B T d_model"]
    mlp_write: Float[torch.Tensor, "B T d_model"]
    entered: Float[torch.Tensor, "B T d_model"] | None = None


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
    logits_of
        Makes logits of the unembedding's output (multiplier, softcap).
    heads_in
        (layer,) number of heads of each layer.
    dtype
        Input dtype of the unembedding.
    stream
        (B, T, d_model) residual stream of all positions.
    last_logits
        (B, R, vocabulary) logits of the last positions, as computed by the model.
    left
        (B, d_model) residual stream that leaves the last layer, before edits of it; None without.
    """

    residual: Float[torch.Tensor, "B d_model"]
    logits: Float32[torch.Tensor, "B vocabulary"]
    final_norm: Any
    unembedding: Any
    dtype: torch.dtype
    logits_of: Callable[[torch.Tensor], torch.Tensor] = lambda unembedded: unembedded
    heads_in: Sequence[int] = ()
    stream: Float[torch.Tensor, "B T d_model"] | None = None
    last_logits: Float[torch.Tensor, "B R vocabulary"] | None = None
    left: Float[torch.Tensor, "B d_model"] | None = None

    def read(self, columns: Int[torch.Tensor, "B R"]) -> Float[torch.Tensor, "B R d_model"]:
        """Return the residual stream (B, R, d_model) of some positions."""
        if columns.shape[1] == 1:
            return self.residual[:, None]
        assert self.stream is not None
        index = columns.to(self.stream.device).unsqueeze(-1).expand(-1, -1, self.stream.shape[-1])
        return self.stream.gather(1, index).to(self.residual.device)


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
        """Record a layer; called for every layer with heads, in order."""

    def passing(self, view: PassingView) -> None:
        """Record a layer without heads; called for every such layer, in order."""

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

    def passing(self, view: PassingView) -> None:
        for recorder in self.recorders:
            recorder.passing(view)

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
        return z

    def enter(
        self, layer: int, residual: Float[torch.Tensor, "B S d_model"], last: bool = False
    ) -> Float[torch.Tensor, "B S d_model"]:
        """Return the edited residual stream entering a layer, or itself if it is not edited.

        After the last layer, it is called with the number of layers. With `last`, the stream is
        that of one position after the prompt's last.
        """
        return residual

    def leave(self, view: LayerView | PassingView) -> None:
        """Keep what is needed of a layer, after all edits of it."""


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
    learned = None if embedding is None else Everywhere(embedding, ())
    masks: dict[Any, torch.Tensor] = {}
    views: dict[int, LayerView] = {}
    shared = architecture.shared_keys
    for index, block in enumerate(architecture.layers(root)):
        residual = entered = block.input
        for edit in edits:
            residual = edit.enter(index, residual)
        before = None
        if residual is not entered:
            block.input, before = residual, entered
        if gradients and index == 0:
            residual = residual.detach().requires_grad_()
            block.input = residual
        mixed = _mixed(architecture, index, block)
        if not architecture.has_heads(index):
            mlp_write = _mlp_write(architecture, index, block, residual)
            residual = residual.to(mlp_write.device)
            mixed = torch.zeros_like(mlp_write) if mixed is None else mixed
            passing = PassingView(architecture, index, block, mask, residual, mixed, mlp_write)
            passing.entered = before
            for edit in edits:
                edit.leave(passing)
            for recorder in recorders:
                recorder.passing(passing)
            continue
        view = _heads(architecture, index, block, mask, residual, views)
        view.mixer_write, view.learned, view.masks = mixed, learned, masks
        view.entered = before
        if index in shared:
            views[index] = view
        projection = architecture.projection(block)
        for edit in edits:
            edited = edit.apply(view, view.z)
            if edited is not view.z:
                view.z = edited
                projection.input = edited.flatten(-2)
        if gradients:
            projection.input = view.z.flatten(-2)
        view.attention_output = projection.output
        view.attention_write = architecture.written(block, view.attention_output)
        view.mlp_write = _mlp_write(architecture, index, block, view.attention_write)
        view.more_write = architecture.more_written(block)
        view.factor = architecture.stream_factor(block)
        for edit in edits:
            edit.leave(view)
        for recorder in recorders:
            recorder.layer(view)
    final_norm, unembedding = architecture.final_norm(root), architecture.unembedding(root)
    stream = left = architecture.end(root)
    for edit in edits:
        stream = edit.enter(architecture.n_layers, stream)
    if stream is not left:
        architecture.replace_end(root, stream)
    residual, device = stream[:, -1], architecture.normed(root).device
    dtype = unembedding.input.dtype
    # accelerate has moved these logits to the device of the tokens.
    last_logits = root.output.logits
    logits = last_logits[:, -1].float()
    heads_in = [architecture.heads_in(layer) for layer in range(architecture.n_layers)]
    ends = (residual.to(device), logits, final_norm, unembedding, dtype)
    end = End(*ends, architecture.logits, heads_in, stream, last_logits)
    end.left = None if stream is left else left[:, -1].to(device)
    return [recorder.finish(end) for recorder in recorders]


def _heads(
    architecture: Architecture,
    index: int,
    block: Any,
    mask: Everywhere,
    residual: Float[torch.Tensor, "B T d_model"],
    views: Mapping[int, LayerView],
) -> LayerView:
    """Read the heads of a layer. Only works in a trace, before the layer's output projection.

    `views` are those of earlier layers, whose keys and values the layer may use.
    """
    attention = architecture.attention(block)
    more = architecture.more_input(block)
    positions = architecture.positions(attention, index)
    projected = [module.output for module in architecture.qkv(block)]
    query, key, value = architecture.split(block, projected)
    source = architecture.keys_of(index)
    if source != index:
        key, value = views[source].key, views[source].value
    z = architecture.projection(block).input.unflatten(-1, (architecture.heads_in(index), -1))
    # It was read before accelerate moved it to the layer's device.
    residual = residual.to(z.device)
    parts = (residual, query, key, value, positions, z, z)
    of_heads = (architecture.gate(block, projected), architecture.sinks(attention))
    view = LayerView(architecture, index, block, mask, *parts, *of_heads, more_input=more)
    if source != index:  # with the rotary embedding of their own layer
        view.last.__dict__["_turned_key"] = views[source].turned_key
    return view


def _mixed(
    architecture: Architecture, index: int, block: Any
) -> Float[torch.Tensor, "B T d_model"] | None:
    """Read what a layer's mixer without heads adds to the residual stream; None without."""
    if not architecture.mixes(index):
        return None
    return architecture.mixer_written(block, architecture.mixer_output(block))


def _mlp_write(
    architecture: Architecture,
    index: int,
    block: Any,
    like: Float[torch.Tensor, "B T d_model"],
) -> Float[torch.Tensor, "B T d_model"]:
    """Read what a layer's MLP adds to the residual stream; 0 without an MLP."""
    if not architecture.has_mlp(index):
        return torch.zeros_like(like)
    return architecture.mlp_written(block, architecture.mlp_output(block))


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
