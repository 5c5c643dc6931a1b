"""The walk: one trace over the layers, in which every measure sees the same view of each layer.

A measure makes a *recorder* for each batch. The walk passes every layer to the recorder, then
the end of the model; the recorder returns tensors. All of this runs inside an nnsight trace, in
the same way for local, sharded, quantized and remote models. The code calls modules, reads no
weights, and uses only torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import nnsight
import torch
from jaxtyping import Float

from ..errors import ModelError
from ..models.measuring import is_autocast
from ..models.remote import reached
from ..models.wrapper import in_order
from .batch import Batch
from .everywhere import Everywhere
from .recorder import BatchEdit, Donors, Recorder
from .views import End, LayerView, PassingView

if TYPE_CHECKING:
    from ..models import Architecture, Model


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
        if index == 0 and is_autocast(residual.device.type):
            raise ModelError(
                "the model's forward computes under autocast, in another dtype than its own: "
                "unwrap it (accelerator.unwrap_model(model, keep_fp32_wrapper=False)), or load it "
                "in the dtype that you want to measure"
            )
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
    with in_order(model.name), reached(model.remote), root.session(**where):
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
