"""Batch sizes: filled, remembered, halved where memory runs out, and of no effect."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import product
from typing import Any
from weakref import finalize

import numpy as np
import pytest
import torch
from families import family_model
from reference import error
from surface import under
from tiny import THREE, byte_level, crossed, hf_model, tiny
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import twotower as tt
from twotower.measures.predictions import PredictionsRecorder
from twotower.walk import judge
from twotower.walk.batch_size import Batches, Found
from twotower.walk.views import LayerView

MESSAGES = {
    "CUDA": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    "processor": RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 9"),
}


@pytest.fixture
def model() -> tt.Model:
    """A model of its own, that remembers nothing yet."""
    return tt.load(hf_model("llama-grouped"), tokenizer=byte_level())


def make(model: tt.Model, n: int = 24) -> tt.Prompts:
    return tt.build_prompts(model, THREE, shots=2, n=n, seed=3)


class Small:
    """A device on which batches of more than so many prompts run out of memory."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, most: int, raised: Exception) -> None:
        self.sizes: list[int] = []
        self.most, self.raised = most, raised
        forward = judge.run_batch

        def run_batch(model, batch, recorders, *edits, **options):
            self.sizes.append(len(batch.rows))
            if len(batch.rows) > self.most:
                recorders = [_Full(self.raised), *recorders]
            return forward(model, batch, recorders, *edits, **options)

        monkeypatch.setattr(judge, "run_batch", run_batch)


class _Full(PredictionsRecorder):
    """Runs out of memory in the middle of the walk."""

    def __init__(self, raised: Exception) -> None:
        self.raised = raised

    def layer(self, view: LayerView) -> None:
        if view.index == 1:
            raise self.raised


def found(model: tt.Model) -> Found:
    (size,) = (x for x in model.cache.values() if isinstance(x, Found))
    return size


MEASURES: dict[str, Callable[..., object]] = {
    "predict": tt.predict,
    "last": lambda m, p, **o: tt.head_effects(m, p, **o),
    "all": lambda m, p, **o: tt.head_effects(m, p, "all", **o),
    "qk": lambda m, p, **o: tt.qk_similarity(m, p, keep="labels", **o),
    "ov": lambda m, p, **o: tt.ov_labels(m, p, **o),
    "attribution": tt.attribution,
    "gradient": tt.attribution_patching,
}


TAKEN = [
    *(("predict", kind, given) for kind in MESSAGES for given in (None, 24)),
    *((what, "CUDA", None) for what in ("last", "attribution", "qk")),
]
"""What `make test` takes: the rest differs in what is measured alone."""

CASES = [
    pytest.param(*case, marks=() if case in TAKEN else pytest.mark.slow)
    for case in product(MEASURES, MESSAGES, (None, 24))
]


@pytest.mark.parametrize(("what", "kind", "given"), CASES)
def test_halved_and_the_same(
    model: tt.Model, what: str, kind: str, given: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts, measure = make(model, 8), MEASURES[what]
    whole = under(measure, model, prompts, batch_size=1)
    device = Small(monkeypatch, 3, MESSAGES[kind])
    halved = under(measure, model, prompts, batch_size=given)
    tried = [n for n in device.sizes if n > 3]
    assert tried == sorted(tried, reverse=True)
    assert len(tried) >= 2
    assert sum(n for n in device.sizes if n <= 3) == len(prompts)
    for name, values in whole.data_vars.items():
        if values.dtype.kind == "f":
            expected, got = np.nan_to_num(values.values), np.nan_to_num(halved[name].values)
            assert error(got, expected) <= 1e-5, name
        else:
            np.testing.assert_array_equal(halved[name], values)
    if given is None:
        assert found(model).halvings == len(tried)
        device.sizes.clear()
        measure(model, prompts)  # remembered: nothing runs out again
        assert max(device.sizes) <= 3


def test_a_single_prompt_too_large(model: tt.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    Small(monkeypatch, 0, MESSAGES["CUDA"])
    with pytest.raises(
        tt.errors.InputError, match=r"single prompt of \d+ tokens: take shorter prompts"
    ):
        tt.predict(model, make(model))


def test_other_errors_are_not_swallowed(model: tt.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    device = Small(monkeypatch, 0, RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        tt.predict(model, make(model))
    assert len(device.sizes) == 1


class Fake:
    """A device with so much memory, of which a batch takes some and each token some."""

    def __init__(self, free: float, once: float, each: float) -> None:
        self.free, self.once, self.each, self.batches = free, once, each, []

    def start(self) -> None:
        pass

    def of(self, tokens: int) -> float:
        return self.once + self.each * tokens

    def headroom(self) -> float:
        return self.free / self.of(self.batches[-1])


def fed(model: tt.Model, prompts: tt.Prompts, device: Fake) -> Iterator[int]:
    feed = Batches(model, prompts, kind="x")
    feed.meter = device
    for batch in feed:
        with feed.attempt():
            device.batches.append(batch.input_ids.numel())
            if device.of(device.batches[-1]) > device.free:
                raise MESSAGES["CUDA"]
            yield len(batch.rows)


def test_a_device_is_filled(model: tt.Model) -> None:
    prompts = make(model, 120)
    bits = prompts.n_positions.bit_length()
    model.cache["batch size", "x", False, bits, bits] = Found(64)
    device = Fake(free=2000, once=200, each=1)
    sizes = list(fed(model, prompts, device))
    assert sum(sizes) == len(prompts)
    # Careful first, then as much as the device holds, less what is kept free.
    assert device.batches[0] <= 64
    assert 0.7 * 2000 <= max(device.of(n) for n in device.batches[:-1]) <= 2000
    assert found(model).halvings == 0
    again = Fake(free=2000, once=200, each=1)
    list(fed(model, prompts, again))
    assert again.batches[0] > 10 * device.batches[0]
    # With less of it free than before, it runs out once or twice and goes on.
    smaller = Fake(free=900, once=200, each=1)
    list(fed(model, prompts, smaller))
    assert found(model).halvings in (1, 2)
    assert max(smaller.of(n) for n in smaller.batches[2:]) <= 900


def test_longest_first_and_near_a_thousand_tokens(model: tt.Model) -> None:
    prompts = make(model, 60)
    batches = list(Batches(model, prompts))
    widths = [batch.width for batch in batches]
    assert widths == sorted(widths, reverse=True)
    assert all(batch.input_ids.numel() <= 1024 for batch in batches)
    assert all(batch.input_ids.numel() > 1024 - batch.width for batch in batches[:-1])
    assert sorted(np.concatenate([batch.rows for batch in batches])) == list(range(60))


class Peak(TorchDispatchMode):
    """Bytes of tensors made while it is on, at their most."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self.seen: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        before = {x.untyped_storage().data_ptr() for x in tree_leaves(args) if torch.is_tensor(x)}
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if torch.is_tensor(x):
                storage = x.untyped_storage()
                if storage.data_ptr() not in before | self.seen and storage.nbytes():
                    self.seen.add(storage.data_ptr())
                    self.now += storage.nbytes()
                    finalize(storage, self._gone, storage.data_ptr(), storage.nbytes())
        self.most = max(self.most, self.now)
        return out

    def _gone(self, where: int, n_bytes: int) -> None:
        self.seen.discard(where)
        self.now -= n_bytes


def test_the_peak_is_seen() -> None:
    with Peak() as peak:
        kept = [torch.zeros(1000) for _ in range(10)]
        for _ in range(5):
            torch.zeros(500)
        assert peak.now == 40_000
        del kept
    assert (peak.now, peak.most) == (0, 42_000)


@pytest.mark.parametrize("logprobs", [False, True])
@pytest.mark.parametrize(("name", "positions"), crossed(["last", "labels", "all"], ["all"]))
def test_a_budget_holds(name: str, positions: str, logprobs: bool) -> None:
    """What a sweep takes is measured, tensor by tensor."""
    within_budget(tiny(name), positions, logprobs)


@pytest.mark.parametrize("positions", ["last", "labels", "all"])
@pytest.mark.parametrize(
    "name",
    [
        pytest.param("gemma2", marks=pytest.mark.slow),
        "deepseek_v3",
        pytest.param("gpt_oss", marks=pytest.mark.slow),
        pytest.param("bloom", marks=pytest.mark.slow),
    ],
)
def test_a_budget_holds_with_features(name: str, positions: str) -> None:
    """Capped scores, latent keys, sinks and experts, and ALiBi."""
    model = tt.load(family_model(name), tokenizer=byte_level())
    within_budget(model, positions, False)


@pytest.mark.parametrize(
    ("name", "outputs", "positions"),
    [
        ("llama-grouped", "all", "all"),
        ("gemma2", "last", "labels"),
        pytest.param("gpt2", "all", "all", marks=pytest.mark.slow),
        pytest.param("gemma2", "all", "all", marks=pytest.mark.slow),
        pytest.param("llama-grouped", "last", "labels", marks=pytest.mark.slow),
    ],
)
def test_a_budget_holds_with_edges(name: str, outputs: str, positions: str) -> None:
    family = name == "gemma2"
    model = tt.load(family_model(name), tokenizer=byte_level()) if family else tiny(name)
    where = {"positions": positions, "outputs": outputs}
    held(tt.edge_effects, model, make(model, 4), None, model.heads[-5:], **where)


@pytest.mark.parametrize("name", ["llama-grouped", "gemma2"])
@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, pytest.param(torch.float32, marks=pytest.mark.slow)]
)
def test_a_budget_holds_where_rounding_is_followed(name: str, dtype: torch.dtype) -> None:
    """Single sources, and all of them together, which needs wider numbers."""
    module = family_model(name) if name == "gemma2" else hf_model(name)
    model = tt.load(module.to(dtype), tokenizer=byte_level())
    every = [*(str(head) for head in model.heads), "embedding", *(f"mlp {n}" for n in range(3))]
    for sources in (None, [[x for x in every if x[0] not in "2" and x != "mlp 2"]]):
        prompts, targets = make(model, 4), [h for h in model.heads if h.layer == 2]
        held(tt.edge_effects, model, prompts, sources, targets, outputs="all")


def test_chunks_of_shared_keys() -> None:
    """Rows that branch off above the layer whose keys they use, in a chunk of their own."""
    model = tt.load(family_model("gemma4_text+all"), tokenizer=byte_level())
    prompts = make(model, 2)
    whole = under(tt.head_effects, model, prompts, "labels", batch_size=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("twotower.sweep.memory.TOKENS_PER_CHUNK", 16)
        parts = under(tt.head_effects, model, prompts, "labels", batch_size=2)
    np.testing.assert_allclose(parts.margin_drop.values, whole.margin_drop.values, atol=1e-5)


@pytest.mark.parametrize(
    ("positions", "dtype"),
    [
        ("last", torch.float32),
        ("all", torch.bfloat16),
        pytest.param("last", torch.bfloat16, marks=pytest.mark.slow),
        pytest.param("all", torch.float32, marks=pytest.mark.slow),
    ],
)
def test_a_budget_holds_with_many_words(positions: str, dtype: torch.dtype) -> None:
    """Logits are most of what is taken: the prompts' own, and those of rows."""
    module = hf_model("llama-grouped", dtype=dtype)
    module.resize_token_embeddings(50_000, mean_resizing=False)
    model = tt.load(module.eval(), tokenizer=byte_level())
    without = within_budget(model, positions, False)
    extra = within_budget(model, positions, True) - without
    assert extra > 0 if positions == "last" else extra >= 0


def within_budget(model: tt.Model, positions: str, logprobs: bool) -> int:
    """The smallest budget of a sweep, which is held, as are larger ones."""
    return held(tt.head_effects, model, make(model, 4), positions, logprobs=logprobs)


def held(measure: Any, model: tt.Model, prompts: tt.Prompts, *given: Any, **options: Any) -> int:
    options["batch_size"] = 4
    under(measure, model, prompts, *given, **options)  # label directions are there
    with pytest.raises(tt.errors.InputError, match="it needs at least") as caught:
        under(measure, model, prompts, *given, memory_budget=1, **options)
    smallest = int(str(caught.value).split("(")[1].split(" bytes")[0])
    for budget in (smallest, 2 * smallest):
        with Peak() as peak:
            under(measure, model, prompts, *given, memory_budget=budget, **options)
        assert peak.most <= budget
    return smallest
