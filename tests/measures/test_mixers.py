"""Rows that continue a mixer's state, against whole sequences and their own sizes."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from families import FAMILIES, configuration, family_model
from tiny import THREE, byte_level

import twotower as tt
from twotower.models.registry import find_architecture
from twotower.sweep import mixers
from twotower.sweep.memory import clean_bytes
from twotower.sweep.mixers import RowMixer, state_bytes
from twotower.sweep.sweep import Sweep

KINDS = {
    "jamba": "Mamba",
    "falcon_h1": "Mamba 2, beside heads",
    "lfm2": "a short convolution",
    "qwen3_next": "the gated delta rule",
    "kimi_linear": "Kimi's delta rule",
}
"""One small model for each kind of mixer."""

WHOLE = ("recurrent_gemma", "nemotron_h")
"""Models whose mixers cannot continue from a state."""

pytestmark = pytest.mark.usefixtures("one_thread")


MORE = (
    *("bailing_hybrid", "bamba", "granitemoehybrid+mamba", "lfm2_moe", "lfm3", "lfm3+plain"),
    *("olmo_hybrid", "qwen3_5", "qwen3_5_moe", "qwen3_5_moe_text", "qwen3_5_text"),
)
"""All others with mixers that can."""


def hybrids() -> list[Any]:
    """All types with mixers, those of `MORE` marked as slow."""
    return [*KINDS, *(pytest.param(name, marks=pytest.mark.slow) for name in MORE)]


@pytest.mark.slow
def test_all_with_mixers_are_named() -> None:
    assert {name for name in FAMILIES if _mixes(name)} - {*WHOLE} == {*KINDS, *MORE}


def _mixes(name: str) -> bool:
    """Check whether a type has mixers: its configuration says so, without a model."""
    types = getattr(configuration(name).get_text_config(decoder=True), "layer_types", None) or ()
    return bool({"linear_attention", "conv", "hybrid", "mamba"} & set(types))


@cache
def model_of(name: str) -> tt.Model:
    return tt.load(family_model(name), tokenizer=byte_level())


@cache
def prompts_of(name: str) -> tt.Prompts:
    """Prompts of unequal length: all but one are padded."""
    found = tt.build_prompts(model_of(name), THREE, shots=1, n=4, seed=2)
    assert len(set(found.lengths)) > 1
    return found


@pytest.fixture
def states(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """States from which rows continue; None for whole sequences."""
    found: list[Any] = []
    mix = RowMixer.mix

    def watched(self: RowMixer, rows: torch.Tensor) -> torch.Tensor:
        found.append(self.state)
        return mix(self, rows)

    monkeypatch.setattr(RowMixer, "mix", watched)
    return found


def drops(name: str, model: tt.Model, **options: Any) -> np.ndarray:
    return tt.head_effects(model, prompts_of(name), logprobs=False, **options).margin_drop.values


def error(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.nanmax(abs(found - expected)) / np.nanmax(abs(expected)))


@pytest.mark.parametrize("name", hybrids())
def test_as_whole_sequences(name: str, states: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(name)
    found = drops(name, model)
    assert states
    size = state_bytes(model)
    assert {sum(x[0].numel() * 4 for x in state.tensors) for state in states} == {size}
    states.clear()
    monkeypatch.setattr(mixers, "steps", lambda architecture: False)
    whole = drops(name, model)
    assert set(states) == {None}
    assert error(found, whole) < 2e-5


@pytest.mark.parametrize("name", WHOLE)
def test_whole_sequences_where_a_mixer_cannot_continue(name: str, states: list[Any]) -> None:
    with tt.set_options(batch_size=1):  # transformers' RecurrentGemma lets padding in
        drops(name, model_of(name))
    assert set(states) == {None}


@pytest.mark.parametrize("positions", ["labels", "all"])
def test_whole_sequences_at_several_positions(positions: str, states: list[Any]) -> None:
    drops("lfm2", model_of("lfm2"), positions=positions)
    assert set(states) == {None}


def test_whole_sequences_where_the_state_does_not_return(
    states: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if a server ran the mixer in another process."""
    model = model_of("lfm2")
    expected, mix = drops("lfm2", model), type(model.architecture).mix
    monkeypatch.setattr(type(model.architecture), "mix", lambda *given: mix(*given[:4]))
    states.clear()
    assert error(drops("lfm2", model), expected) < 1e-5
    assert set(states) == {None}


def test_limits_of_time_steps() -> None:
    """A single step of transformers' Mamba 2 ignores them."""
    config = configuration("bamba")
    for limits, argument in (((0.0, float("inf")), "cache_params"), ((0.01, 0.1), None)):
        config.time_step_limit = limits
        with torch.device("meta"):
            module = type(family_model("bamba"))(config)
        assert find_architecture(config, module).mixer_cache == argument


def test_in_double_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """A convolution computes in its own dtype, so that nothing is lost."""
    module = family_model("lfm2").double()
    module.set_attn_implementation("sdpa")  # the other one makes padding NaN in float64
    model = tt.load(module, tokenizer=byte_level())
    found = drops("lfm2", model)
    monkeypatch.setattr(mixers, "steps", lambda architecture: False)
    assert error(found, drops("lfm2", model)) < 1e-11


@pytest.mark.parametrize("name", KINDS)
def test_in_half_precision(name: str) -> None:
    """The unchanged row agrees with the clean run as far as the proof demands."""
    model = tt.load(family_model(name).bfloat16(), tokenizer=byte_level())
    assert np.isfinite(drops(name, model)).any()


def test_few_states_at_a_time(states: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("qwen3_next")
    expected = drops("qwen3_next", model)
    monkeypatch.setattr(mixers, "STATE_BYTES", 2 * 4 * state_bytes(model))  # of two rows
    assert error(drops("qwen3_next", model), expected) < 1e-5


def test_states_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several chunks keep the states of all layers: in the estimate, and no more than it."""
    name = "qwen3_next"
    model, prompts = model_of(name), prompts_of(name)
    kept: list[int] = []
    finish = Sweep.finish

    def counted(self: Sweep, end: Any) -> dict[str, torch.Tensor]:
        mixing = [clean.mixer for clean in self.layers if clean.mixer is not None]
        of_states = [x.nbytes for mixer in mixing for x in mixer.state.tensors]
        kept.append(sum(of_states) + sum(mixer.residual.nbytes for mixer in mixing))
        return finish(self, end)

    monkeypatch.setattr("twotower.sweep.memory.TOKENS_PER_CHUNK", 9)
    expected = drops(name, model)
    monkeypatch.setattr(Sweep, "finish", counted)
    assert error(drops(name, model), expected) < 1e-5
    sizes = (len(prompts), 1, int(prompts.lengths.max()) - 1)
    estimate = clean_bytes(model, *sizes)
    monkeypatch.setattr("twotower.sweep.memory._n_mixers", lambda model: 0)
    without = clean_bytes(model, *sizes)
    assert 0 < max(kept) <= estimate - without
