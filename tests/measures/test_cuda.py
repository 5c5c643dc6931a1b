"""On a GPU: nothing waits in a walk, results are the processor's, batches fill the memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from surface import MEASURES, same, under
from tiny import ARCHITECTURES, THREE, byte_level, hf_model, tiny

import twotower as tt
from twotower.walk import walk as walking
from twotower.walk.batch_size import Found
from twotower.walk.recorder import Recorder
from twotower.walk.views import LayerView

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


class _Strict(Recorder):
    """From the first layer to the end, whatever waits for the GPU is an error."""

    def layer(self, view: LayerView) -> None:
        torch.cuda.set_sync_debug_mode("error")


@pytest.fixture
def strict(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Refuse to wait in any walk: transformers may, for the mask, before the first layer."""
    walk = walking.walk

    def strict_walk(architecture: Any, root: Any, mask: Any, recorders: Any, *more: Any) -> Any:
        try:
            # First of all, so that it holds from the first layer's recorders on.
            return walk(architecture, root, mask, [_Strict(), *recorders], *more)[1:]
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(walking, "walk", strict_walk)
    yield
    torch.cuda.set_sync_debug_mode("default")


def on_gpu(name: str, dtype: torch.dtype = torch.float32) -> tt.Model:
    return tt.load(hf_model(name, dtype=dtype).cuda(), tokenizer=byte_level())


def make(model: tt.Model, n: int = 6) -> tt.Prompts:
    return tt.build_prompts(model, THREE, shots=1, n=n, seed=2)


@pytest.mark.parametrize("what", MEASURES)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_as_on_a_processor_and_without_waiting(name: str, what: str, strict: None) -> None:
    if torch.backends.cuda.matmul.allow_tf32:
        pytest.skip("products are rounded to TF32")
    model, other = on_gpu(name), tiny(name)
    prompts = make(model)
    same(MEASURES[what](model, prompts), MEASURES[what](other, prompts), 1e-4)


def test_waiting_is_seen(strict: None) -> None:
    model = on_gpu("llama")

    class Waits(Recorder):
        def layer(self, view: LayerView) -> None:
            view.residual.sum().item()

    from twotower.walk.batch import make_batch

    batch = make_batch(model, make(model), np.arange(2))
    with pytest.raises(Exception, match="synchroniz"):
        walking.run_batch(model, batch, [Waits()])


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_half_precision(name: str, strict: None) -> None:
    model = on_gpu(name, torch.bfloat16)
    prompts = make(model)
    run = tt.analyze(model, prompts)
    assert np.isfinite(run["effects"]["margin_drop"]).all()
    assert np.isfinite(tt.head_effects(model, prompts, "all")["margin_drop"]).all()


@pytest.mark.parametrize("what", ["qk", "last", "predict"])
def test_batches_grow(what: str) -> None:
    model = on_gpu("llama-grouped")
    prompts = make(model, 200)
    MEASURES[what](model, prompts)
    (size,) = (x for x in model.cache.values() if isinstance(x, Found))
    assert size.halvings == 0
    assert size.tokens > 4096


@pytest.mark.parametrize("batch_size", [None, 200])
def test_memory_runs_out(batch_size: int | None) -> None:
    """Of a share of the memory, so small that the batch does not fit: half of it, and on."""
    model = on_gpu("llama-grouped")
    prompts = make(model, 200)
    expected = under(tt.qk_similarity, model, prompts, batch_size=20)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    under(tt.qk_similarity, model, prompts, batch_size=200)
    taken = torch.cuda.max_memory_allocated() - before
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    for x in [x for x in model.cache if x[0] == "batch size"]:
        del model.cache[x]
    if batch_size is None:  # as if an earlier call had found room for all
        bits = prompts.n_positions.bit_length()
        key = ("batch size", ("qk", False, False), False, bits, bits)
        model.cache[key] = Found(10**6)
    torch.cuda.set_per_process_memory_fraction((before + taken / 3 + 2**21) / total)
    try:
        found = under(tt.qk_similarity, model, prompts, batch_size=batch_size)
        if batch_size is None:
            assert model.cache[key].halvings > 0
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    same(found, expected, 1e-5)
