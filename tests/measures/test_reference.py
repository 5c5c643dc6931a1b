"""The reference written from weights equals transformers' own modules."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from reference import Reference, answer, error, hooked, ids_of, knocked_out, plain_logits
from tiny import DISTINCT, THREE, crossed

import twotower as tt


def make(model: tt.Model, n: int = 2) -> tt.Prompts:
    return tt.build_prompts(model, THREE, shots=1, n=n, seed=1)


def test_forward(any_model: tt.Model) -> None:
    module, prompts = any_model.module, make(any_model)
    reference = Reference(module)
    for i in range(len(prompts)):
        ids = ids_of(prompts, i)
        run = reference.run(ids)
        with torch.no_grad():
            own = module(input_ids=ids[None], output_attentions=True, output_hidden_states=True)
        assert error(own.logits[0], run.logits) <= 1e-5
        assert error(torch.stack(own.attentions)[:, 0], torch.stack(run.attention)) <= 1e-5
        # transformers' last hidden state is the normed one.
        states = torch.stack(own.hidden_states)[:-1, 0]
        assert error(states, torch.stack(run.residual[:-1])) <= 1e-5


@pytest.mark.parametrize(
    ("any_model", "positions"),
    crossed(["last", "labels", "all"], ["all"], on=DISTINCT),
    indirect=["any_model"],
)
def test_knocked_out_is_a_hooked_forward_per_head(any_model: tt.Model, positions: str) -> None:
    """float32, pre-hooks on the output projections, against the weights in float64."""
    module, prompts = any_model.module, make(any_model, n=1)
    at = prompts.where(positions)
    expected, expected_logprobs = knocked_out(Reference(module), prompts, at)
    ids = ids_of(prompts, 0)
    clean, clean_logprobs = answer(plain_logits(module, ids), prompts, 0)
    margins, logprobs = np.zeros_like(expected), np.zeros_like(expected_logprobs)
    for layer, head in any_model.heads:

        def edit(index, z, layer=layer, head=head):
            if index == layer:
                z[torch.as_tensor(at[0]), head] = 0
            return z

        with hooked(module, any_model.n_heads, edit):
            margin, logprob = answer(plain_logits(module, ids), prompts, 0)
        margins[0, layer, head] = clean - margin
        logprobs[0, layer, head] = clean_logprobs - logprob
    # Small differences of large logits: float32 leaves fewer digits than in the logits.
    assert error(margins, expected) <= 1e-4
    assert error(logprobs, expected_logprobs) <= 1e-4
