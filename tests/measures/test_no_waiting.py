"""Nothing in a walk waits for the device, told without one.

The models are put on the meta device, whose tensors have no values: all that would have to
bring a value to the host fails. What is watched besides are operations that wait, and
tensors that come from the host or go there while the walk is under way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from nnsight import TransformersModel
from tiny import MIXED, THREE, byte_level, crossed, hf_model, tiny, transported
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import twotower as tt
from twotower.edits.prepared_edits import PreparedEdits
from twotower.measures.attribution import Attribution
from twotower.measures.attribution_patching import GradientEffects
from twotower.measures.measure import Measure
from twotower.measures.ov import LabelValues
from twotower.measures.predictions import Predictions
from twotower.measures.qk import Similarity
from twotower.measures.residual import ResidualStreams
from twotower.measures.shares import AttentionShares
from twotower.models.rounding import Rounding
from twotower.sweep.prepare import prepare_sweep
from twotower.walk import walk as walking
from twotower.walk.batch import Batch, columns_of, make_batch
from twotower.walk.proof import Proof
from twotower.walk.readout import get_readout
from twotower.walk.recorder import Recorder
from twotower.walk.views import End, LayerView
from twotower.walk.walk import run_batch

aten = torch.ops.aten
WAITING = {
    aten._local_scalar_dense,
    aten.is_nonzero,
    aten.equal,
    aten.nonzero,
    aten.masked_select,
    aten.repeat_interleave,
}


class WaitingError(Exception):
    """Something in the walk would wait for the device."""


class Watch(TorchDispatchMode):
    """Refuses what waits for the device."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        given = tensors((args, kwargs))
        what = func.overloadpacket
        if what in WAITING:
            raise WaitingError(str(func))
        if what in (aten.index, aten.index_put, aten.index_put_):
            indices = [x for x in args[1] if x is not None]
            if any(x.dtype in (torch.bool, torch.uint8) for x in indices):
                raise WaitingError(f"{func} with a boolean mask")
            given += [x.expand(1) if x.dim() == 0 else x for x in indices]
        found = func(*args, **kwargs)
        # A number stands among tensors as one of no dims, and is no copy.
        copied = what in (aten._to_copy, aten.copy_)
        devices = {x.device for x in (*given, *tensors(found)) if x.dim() or copied}
        if len(devices) > 1:
            raise WaitingError(f"{func} between devices")
        return found


class WatchLists(TorchFunctionMode):
    """Refuses lists and arrays, as indices too: they go from the host to the device."""

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        if func in (torch.Tensor.__getitem__, torch.Tensor.__setitem__):
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            if any(isinstance(x, (list, np.ndarray)) for x in index):
                raise WaitingError("a list as an index")
        if func in (torch.tensor, torch.as_tensor):
            raise WaitingError(f"{func} in a walk")
        return func(*args, **(kwargs or {}))


def tensors(tree: Any) -> list[torch.Tensor]:
    return [x for x in tree_leaves(tree) if isinstance(x, torch.Tensor)]


def watched(*arguments: Any) -> Any:
    with Watch(), WatchLists():
        return WALK(*arguments)


WALK = walking.walk


@cache
def without_values(name: str, dtype: torch.dtype = torch.float32) -> tuple[tt.Model, tt.Prompts]:
    """A tiny model on the meta device, and prompts."""
    model = tiny(name)
    prompts = tt.build_prompts(model, THREE, shots=1, n=4, seed=2)
    readout = replace(get_readout(model, prompts.label_ids), _copies={})
    traced = TransformersModel(hf_model(name, dtype=dtype), tokenizer=byte_level())
    traced._module.to("meta")
    found = replace(model, traced=traced, cache={})
    found.look()
    found.cache["readout", prompts.label_ids] = readout
    assert found.device.type == "meta"
    readout.on(found.device)  # as get_readout does with every device it meets
    return found, prompts


def run(
    model: tt.Model,
    prompts: tt.Prompts,
    make: Callable[[Batch], Iterable[Recorder]],
    keep: str | None = None,
    gradients: bool = False,
    edits: Sequence[Any] = (),
) -> None:
    columns = None if keep is None else columns_of(prompts.where(keep))
    prepared = PreparedEdits(model, prompts, edits)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(walking, "walk", watched)
        for rows in (np.arange(4), np.arange(1)):
            batch = make_batch(model, prompts, rows, columns)
            recorders, ready = list(make(batch)), prepared.for_batch(batch)
            recorders.append(Proof(Rounding.of(model), recorders))
            results = run_batch(model, batch, recorders, ready, gradients=gradients, on_cpu=False)
            assert all(x.device.type == "meta" for found in results for x in found.values())


@pytest.mark.parametrize(("name", "keep"), crossed([None, "labels"], [None], on=("gpt2",)))
def test_towers(name: str, keep: str | None) -> None:
    model, prompts = without_values(name)
    measures: list[Measure] = [
        Predictions(),
        Similarity(),
        LabelValues(top_tokens=(tt.Head(0, 1), tt.Head(2, 3))),
        Attribution("own"),
        Attribution("frozen"),
        ResidualStreams(),
        AttentionShares(),
    ]
    makers = [measure.prepare(model, prompts) for measure in measures]
    run(model, prompts, lambda batch: [make(batch) for make in makers], keep=keep)


@pytest.mark.parametrize(("name", "positions"), crossed(["last", "all"], ["all"], on=("gpt2",)))
def test_edits(name: str, positions: str) -> None:
    model, prompts = without_values(name)
    twin, foo = prompts.reversed_labels(), tt.at(role="label", label="foo")
    edits = [
        tt.KnockOut([(0, 0)], positions),
        tt.KnockOut([(0, 1)], positions, to=tt.Times(2.0)),
        tt.ScaleAttention([(0, 2), (1, 1)], 2.0, foo, renormalize=True, positions=positions),
        tt.DropPosition([(1, 0)], positions=positions),
        tt.Patch([(1, 2)], twin, "attention", positions),
        tt.Patch([(1, 2), (2, 2)], twin, "values", positions),
        tt.KnockOut([(2, 0)], positions, to=tt.From(twin)),
    ]
    if name != "gpt2":
        edits.append(tt.DropPosition([(2, 1)], foo, positions, distance="mean"))
    answers = Predictions().prepare(model, prompts)
    run(model, prompts, lambda batch: [answers(batch)], edits=edits)


@pytest.mark.parametrize(
    ("name", "positions"),
    crossed(["last", "labels", "all"], ["all"], on=("gpt2",), rare=["last"]),
)
def test_sweeps(name: str, positions: str) -> None:
    """At the last position, mixers and half precision are swept as well."""
    run_sweeps(name, positions)


@pytest.mark.parametrize(("name", "positions"), crossed(["all"]))
def test_several_chunks(name: str, positions: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("twotower.sweep.memory.TOKENS_PER_CHUNK", 96)
    run_sweeps(name, positions)


@pytest.mark.parametrize("name", MIXED)
def test_mixers(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Else transformers itself asks for each batch whether there is padding.
    monkeypatch.setattr("transformers.masking_utils.is_tracing", lambda *_: True)
    model, prompts = without_values(name)
    heads = prepare_sweep(model, prompts, logprobs=True)
    run(model, prompts, lambda batch: [heads(batch)])


def run_sweeps(name: str, positions: str) -> None:
    model, prompts = without_values(name)
    heads = prepare_sweep(model, prompts, positions, logprobs=True)
    scaled = prepare_sweep(model, prompts, positions, tt.Times(2.0))
    groups = [((0, 1), (1, 2)), ((0, 1), (2, 0)), ((0, 1), (2, 0), (2, 1)), ((1, 0),)]
    together = prepare_sweep(model, prompts, positions, groups=groups, logprobs=True)
    run(model, prompts, lambda batch: [heads(batch), scaled(batch), together(batch)])


@pytest.mark.parametrize("name", transported())
def test_half_precision(name: str) -> None:
    model, prompts = without_values(name, torch.bfloat16)
    sweep = prepare_sweep(model, prompts, logprobs=True)
    values = LabelValues().prepare(model, prompts)
    run(model, prompts, lambda batch: [sweep(batch), values(batch)])


@pytest.mark.parametrize("name", transported())
def test_gradients(name: str) -> None:
    model, prompts = without_values(name)
    make = GradientEffects().prepare(model, prompts)
    run(model, prompts, lambda batch: [make(batch)], gradients=True)


class Culprit(Recorder):
    """Does something in the walk that waits."""

    def __init__(self, act: Callable[[torch.Tensor], Any]) -> None:
        self.act = act

    def layer(self, view: LayerView) -> None:
        self.act(view.residual)

    def finish(self, end: End) -> dict[str, torch.Tensor]:
        return {}


CULPRITS: dict[str, Callable[[torch.Tensor], Any]] = {
    "item": lambda x: x.sum().item(),
    "bool": lambda x: bool(x.any()),
    "list": lambda x: x[:, [0, 1]],
    "list, set": lambda x: x.clone().__setitem__([0], 1.0),
    "mask": lambda x: x[x > 0],
    "mask, set": lambda x: x.clone().__setitem__(x > 0, x.new_zeros(())),
    "nonzero": lambda x: x.nonzero(),
    "equal": lambda x: torch.equal(x, x),
    "number": lambda x: torch.tensor(1.0, device=x.device),
    "upload": lambda x: torch.tensor([1, 2], device=x.device),
    "array": lambda x: torch.as_tensor(np.ones(2), device=x.device),
    "moved": lambda x: torch.arange(2).to(x.device),
    "index of the host": lambda x: x[torch.arange(1)],
    "cpu": lambda x: x.cpu(),
    "numpy": lambda x: x.numpy(),
}


@pytest.mark.parametrize("what", CULPRITS)
def test_what_waits_is_seen(what: str) -> None:
    model, prompts = without_values("llama")
    with pytest.raises(Exception) as caught:  # noqa: PT011 (nnsight gives errors its own class)
        run(model, prompts, lambda batch: [Culprit(CULPRITS[what])])
    words = ("WaitingError", "meta")
    assert any(word in f"{type(caught.value)} {caught.value}" for word in words)


@pytest.mark.parametrize("name", transported())
def test_nothing_waits_on_a_processor(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same watch with values, on donors and means too."""
    model = tiny(name)
    prompts = tt.build_prompts(model, THREE, shots=1, n=4, seed=2)
    donors = tt.build_prompts(model, THREE, shots=1, n=4, seed=5)
    tt.head_effects(model, prompts)  # label directions may be probed with waiting
    monkeypatch.setattr(walking, "walk", watched)
    tt.analyze(model, prompts)
    for to in (tt.Mean(donors), tt.Resample(donors), tt.From(donors)):
        tt.head_effects(model, prompts, to=to)
