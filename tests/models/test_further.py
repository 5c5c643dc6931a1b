"""Any architecture against transformers' own forward: what a new adapter has to pass.

Nothing here knows an architecture but through its adapter's places; hooks and attention
weights are transformers' and PyTorch's own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from tiny import ARCHITECTURES, FURTHER, THREE, byte_level, hf_model, tiny

import twotower as tt
from twotower.models.check import check_model
from twotower.testing import Planting

NAMES = [*FURTHER, "llama-grouped", "gpt2"]  # the two show that the tests themselves hold


@contextmanager
def without(model: tt.Model, head: tt.Head) -> Iterator[None]:
    """A forward in which a head's output is zero, by a hook of PyTorch's."""
    block = model.architecture.layers(model.module)[head.layer]

    def zero(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor]:
        z = inputs[0].clone().unflatten(-1, (model.n_heads, -1))
        z[..., head.head, :] = 0
        return (z.flatten(-2),)

    handle = model.architecture.projection(block).register_forward_pre_hook(zero)
    try:
        yield
    finally:
        handle.remove()


@pytest.fixture(params=NAMES)
def both(request: pytest.FixtureRequest) -> tuple[tt.Model, tt.Prompts]:
    model = tiny(request.param)
    return model, tt.build_prompts(model, THREE, shots=2, n=3, seed=2)


def forward(model: tt.Model, prompts: tt.Prompts, number: int, **options: bool):
    """One prompt without padding through the transformers model."""
    ids = prompts.token_id[number]
    with torch.no_grad():
        return model.module(torch.tensor(ids[ids >= 0])[None], use_cache=False, **options)


def test_the_check_at_load(both) -> None:
    assert max(one.error for one in check_model(both[0]).values()) < 1e-4


def test_every_knock_out(both) -> None:
    model, prompts = both
    effects = tt.head_effects(model, prompts, positions="all")
    answers = tt.predict(model, prompts)
    for number in range(len(prompts)):
        labels = list(prompts.label_ids)
        clean = forward(model, prompts, number).logits[0, -1].log_softmax(-1)
        own = answers.logprob.values[number]
        np.testing.assert_allclose(own, clean[labels].numpy(), rtol=1e-4, atol=1e-4)
        for head in model.heads:
            with without(model, head):
                out = forward(model, prompts, number).logits[0, -1].log_softmax(-1)
            expected = (clean - out)[labels].numpy()
            found = effects.logprob_drop.values[number][head]
            np.testing.assert_allclose(found, expected, rtol=1e-3, atol=2e-4)


def test_attention(both) -> None:
    model, prompts = both
    found = tt.qk_similarity(model, prompts).attention.values
    for number in range(len(prompts)):
        own = forward(model, prompts, number, output_attentions=True).attentions
        n = int(prompts.lengths[number])
        for layer, weights in enumerate(own):
            np.testing.assert_allclose(
                found[number, layer, :, -n:], weights[0, :, -1].numpy(), rtol=1e-4, atol=1e-5
            )


def test_label_logits_add_up(both) -> None:
    """Attention-weighted value-output vectors of a head sum to its output, norm and all."""
    model, prompts = both
    run = tt.analyze(model, prompts)
    summed = run.tt.weighted().sum("position").transpose("prompt", "layer", "head", "label")
    written = run.attribution.label_logit
    np.testing.assert_allclose(summed.values, written.values, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", FURTHER)
def test_edits_and_kernels(name: str) -> None:
    for attention in ("eager", "sdpa"):
        model = tt.load(hf_model(name, attention), tokenizer=byte_level())
        prompts = tt.build_prompts(model, THREE, shots=2, n=3, seed=2)
        heads = [tt.Head(1, 1), tt.Head(2, 3)]
        same = tt.Patch(heads, prompts, what="attention")
        clean, patched = (tt.predict(model, prompts, edits).logit for edits in ([], [same]))
        np.testing.assert_allclose(patched.values, clean.values, rtol=1e-3, atol=1e-4)
        out = tt.predict(model, prompts, [tt.KnockOut(heads[:1], positions="all")]).margin.values
        swept = tt.head_effects(model, prompts, positions="all", logprobs=False)
        drop = swept.margin_drop.sel(layer=1, head=1).values
        margin = tt.predict(model, prompts).margin.values
        np.testing.assert_allclose(drop, margin - out, rtol=1e-3, atol=1e-4)


def test_planted_families_are_among_them() -> None:
    """What is planted in these families is read by the same adapters."""
    for name in ("gpt2", "gptj", "llama", "neox"):
        kind = type(Planting(name).load().architecture)
        assert any(type(tiny(one).architecture) is kind for one in ARCHITECTURES)
