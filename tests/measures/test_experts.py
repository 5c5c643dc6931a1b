"""Mixtures of experts in coarse dtypes: rounding may change which experts a token gets."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
from families import family_model
from tiny import TWO, byte_level, draw_weights

import twotower as tt
from twotower.walk import judge


def experts(seed: int) -> tt.Model:
    module = family_model("olmoe")
    torch.manual_seed(seed)
    draw_weights(module)
    return tt.load(module.bfloat16(), tokenizer=byte_level())


def test_rounding_that_changes_a_choice_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    model = experts(12)
    prompts = tt.build_prompts(model, TWO, shots=2, n=6, seed=11)
    with pytest.warns(tt.errors.TwoTowerWarning, match="rounding changes which experts") as told:
        found = tt.head_effects(model, prompts, logprobs=False)
    assert len(told) == 1
    assert told[0].filename == __file__
    proof = json.loads(found.attrs["proof"])
    assert proof["unsteady"] == ["unchanged row"]
    one = proof["identities"]["unchanged row"]
    assert one["error"] > one["allowed"]
    # A model without experts would be refused.
    monkeypatch.setattr(judge.Rounding, "is_unsteady", staticmethod(lambda model, error: False))
    with pytest.raises(tt.errors.CheckError, match="nothing is changed leaves the clean run"):
        tt.head_effects(model, prompts, logprobs=False)


def test_others_are_not_told() -> None:
    model = experts(1)
    prompts = tt.build_prompts(model, TWO, shots=2, n=6, seed=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = tt.head_effects(model, prompts, logprobs=False)
    assert "unsteady" not in json.loads(found.attrs["proof"])


def test_a_mistake_in_every_prompt_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The experts of counterfactuals are given another input than those of the model."""
    model = experts(1)
    prompts = tt.build_prompts(model, TWO, shots=2, n=6, seed=0)
    kind = type(model.architecture)
    own = kind.feed_forward
    monkeypatch.setattr(kind, "feed_forward", lambda self, block, x: own(self, block, 1.2 * x))
    with pytest.raises(tt.errors.CheckError, match="leaves the clean run|lowers the margin"):
        tt.head_effects(model, prompts, logprobs=False)


def test_a_batch_that_mixes_prompts_is_refused() -> None:
    """Its error is larger than that of other experts."""
    model = experts(1)
    prompts = tt.build_prompts(model, TWO, shots=2, n=6, seed=0)
    embedding = model.module.get_input_embeddings()
    embedding.register_forward_hook(lambda module, given, out: out - out.mean(0) / 2)
    with pytest.raises(tt.errors.CheckError, match="other logits than alone"):
        tt.predict(model, prompts)
