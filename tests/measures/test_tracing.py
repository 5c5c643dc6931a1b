"""Causal tracing and attribution patching."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from reference import Reference, answer, error, hooked, ids_of, plain_logits, real
from surface import under
from tiny import THREE, crossed, tiny

import twotower as tt
from twotower.measures.agreement import Agreement, agreement


def make(model: tt.Model, n: int = 4) -> tt.Prompts:
    return tt.build_prompts(model, THREE, shots=1, n=n, seed=2)


@pytest.mark.parametrize(
    ("any_model", "positions"),
    crossed(["last", "labels", "all"], ["all"]),
    indirect=["any_model"],
)
def test_tracing_is_a_forward_per_head(any_model: tt.Model, positions: str) -> None:
    prompts = make(any_model)
    corrupted = prompts.reversed_labels()
    found = under(tt.causal_tracing, any_model, prompts, corrupted, positions, batch_size=3)
    reference = Reference(any_model.module)
    for i in range(len(prompts)):
        clean = reference.run(ids_of(prompts, i))
        mask = torch.as_tensor(corrupted.where(positions)[i][real(corrupted, i)])
        before = answer(reference.run(ids_of(corrupted, i)).logits[-1], prompts, i)[0]
        expected = np.zeros((any_model.n_layers, any_model.n_heads))
        for layer, head in any_model.heads:

            def put_in(index, z, layer=layer, head=head, mask=mask, clean=clean):
                if index == layer:
                    z[mask, head] = clean.z[layer][mask, head]
                return z

            after = reference.run(ids_of(corrupted, i), put_in).logits[-1]
            expected[layer, head] = answer(after, prompts, i)[0] - before
        one = found.isel(prompt=i)
        assert error(one["margin_gain"], expected) <= 1e-4
        assert one["margin_corrupted"].item() == pytest.approx(before, abs=1e-4)
        own = answer(clean.logits[-1], prompts, i)[0]
        assert one["margin_clean"].item() == pytest.approx(own, abs=1e-4)


def test_other_queries(llama: tt.Model) -> None:
    prompts = make(llama, n=6)
    others = prompts.other_queries(seed=3)
    found = tt.causal_tracing(llama, prompts, others)
    assert (others.query_class != prompts.query_class).all()
    assert list(others.gold) != list(prompts.gold)
    for one, other in zip(prompts, others, strict=True):
        kept = [s for s in one.segments if s.role != "query"]
        assert kept == [s for s in other.segments if s.role != "query"]
        (label,) = {s.label for s in one.segments if s.demonstration_class == other.query_class}
        assert other.gold == label
        demonstrated = {s.text for s in other.segments if s.role == "text"}
        assert other.text not in demonstrated
    again = tt.causal_tracing(llama, prompts, prompts.other_queries(seed=3))
    np.testing.assert_array_equal(found["margin_gain"], again["margin_gain"])
    # Putting a prompt's own output in changes nothing.
    same = tt.causal_tracing(llama, prompts, prompts)
    assert np.abs(same["margin_gain"]).max() < 1e-5


def test_prompts_that_do_not_fit(llama: tt.Model) -> None:
    prompts = make(llama)
    other = tt.build_prompts(llama, THREE, labels=("bar", "foo", "map"), shots=1, n=4, seed=2)
    with pytest.raises(tt.errors.InputError, match="corrupted prompts have labels"):
        tt.causal_tracing(llama, prompts, other)
    with pytest.raises(tt.errors.InputError, match="2 donors for 4"):
        tt.causal_tracing(llama, prompts[:2], prompts)
    with pytest.raises(tt.errors.InputError, match="cannot be aligned"):
        tt.causal_tracing(llama, prompts, make(llama, 8)[4:], "all")
    alone = prompts[0]
    with pytest.raises(tt.errors.InputError, match="no other prompt asks"):
        alone.other_queries()


@pytest.mark.parametrize(
    ("any_model", "positions"),
    crossed(["last", "labels", "all"], ["all"]),
    indirect=["any_model"],
)
def test_attribution_patching_is_the_slope(any_model: tt.Model, positions: str) -> None:
    """For a small change the estimate is the exact effect, by two plain forwards."""
    prompts = make(any_model, n=2)
    step = 1e-3
    found = tt.attribution_patching(any_model, prompts, positions, to=tt.Times(1 - step))
    reference = Reference(any_model.module)
    expected = np.zeros(found["margin_drop"].shape)
    for i in range(len(prompts)):
        mask = torch.as_tensor(prompts.where(positions)[i][real(prompts, i)])
        for layer, head in any_model.heads:
            margins = []
            for factor in (1 + step, 1 - step):

                def scale(index, z, layer=layer, head=head, mask=mask, factor=factor):
                    if index == layer:
                        z[mask, head] *= factor
                    return z

                logits = reference.run(ids_of(prompts, i), scale).logits[-1]
                margins.append(answer(logits, prompts, i)[0])
            expected[i, layer, head] = (margins[0] - margins[1]) / 2
    assert error(found["margin_drop"], expected) <= 1e-3
    assert found.attrs["settings"].count('"estimate": "gradient"') == 1


def test_gradients_for_each_change(llama: tt.Model) -> None:
    """Linear in the change: zero, mean and patch differ in what z is moved to alone."""
    prompts = make(llama)
    twin = prompts.reversed_labels()
    zero = tt.attribution_patching(llama, prompts)["margin_drop"].values
    double = tt.attribution_patching(llama, prompts, to=tt.Times(2.0))["margin_drop"]
    np.testing.assert_allclose(double, -zero, atol=1e-5)
    own = tt.attribution_patching(llama, prompts, to=tt.From(prompts))
    assert np.abs(own["margin_drop"]).max() < 1e-5
    patched = tt.attribution_patching(llama, prompts, to=tt.From(twin))
    back = under(tt.attribution_patching, llama, prompts, batch_size=1, to=tt.From(twin))
    np.testing.assert_allclose(patched["margin_drop"], back["margin_drop"], atol=1e-5)
    # The model goes on as before: nothing keeps a gradient.
    assert all(p.grad is None for p in llama.module.parameters())
    logits = plain_logits(llama.module, ids_of(prompts, 0))
    with hooked(llama.module, llama.n_heads, lambda layer, z: z):
        assert torch.equal(plain_logits(llama.module, ids_of(prompts, 0)), logits)


def test_gradients_of_frozen_and_quantized_models(llama: tt.Model) -> None:
    prompts = make(llama)
    expected = tt.attribution_patching(llama, prompts)["margin_drop"]
    states = [p.requires_grad for p in llama.module.parameters()]
    try:
        llama.module.requires_grad_(not states[0])
        np.testing.assert_allclose(
            tt.attribution_patching(llama, prompts)["margin_drop"], expected, atol=1e-6
        )
    finally:
        for parameter, state in zip(llama.module.parameters(), states, strict=True):
            parameter.requires_grad_(state)
    with pytest.raises(tt.errors.InputError, match="positions are empty"):
        tt.attribution_patching(llama, prompts, prompts.role == "nothing")


def test_agreement(llama: tt.Model) -> None:
    prompts = make(llama)
    exact = tt.head_effects(llama, prompts)
    same = agreement(exact, exact, k=5)
    assert same == Agreement(1.0, 1.0, [], 1.0)
    turned = exact.copy(deep=True)
    turned["margin_drop"] = -turned["margin_drop"]
    against = agreement(exact, turned, k=5)
    assert against.rank_correlation == pytest.approx(-1)
    assert against.missed == tt.in_context_heads(exact, 5)
    assert against.found == 0
    half = exact.copy(deep=True)
    best, _ = tt.in_context_heads(exact, 2)
    half["margin_drop"][:, best.layer, best.head] = -100
    assert agreement(exact, half, k=2).missed == [best]
    assert agreement(exact, half, k=2).found == 0.5
    with pytest.raises(tt.errors.InputError, match="on different models"):
        agreement(exact, tt.head_effects(tiny("gpt2"), make(tiny("gpt2"), 3)), k=2)
