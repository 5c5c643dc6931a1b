"""Residual streams against plain hooks, at every kind of position that can be kept."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from surface import under
from tiny import TWO

import twotower as tt
from twotower.measures.residual import residual_streams


def streams(model: tt.Model, ids: torch.Tensor) -> np.ndarray:
    """(layer, T, d_model) what enters every block, by hooks, one prompt without padding."""
    found: list[torch.Tensor] = []
    handles = [
        block.register_forward_pre_hook(
            lambda m, a, k: found.append((a[0] if a else k["hidden_states"])[0].clone()),
            with_kwargs=True,
        )
        for block in model.architecture.layers(model.module)
    ]
    with torch.no_grad():
        model.module(input_ids=ids[None], use_cache=False)
    for handle in handles:
        handle.remove()
    return torch.stack(found).numpy()


def test_residual_streams(any_model: tt.Model) -> None:
    prompts = tt.build_prompts(any_model, TWO, shots=2, n=4, seed=1)
    assert len(set(prompts.lengths)) > 1  # so that there is padding
    whole = residual_streams(any_model, prompts, keep="all")
    labels = under(residual_streams, any_model, prompts, batch_size=3)
    assert whole["residual"].dims == ("prompt", "layer", "position", "feature")
    assert labels.sizes["position"] == 4
    for i in range(len(prompts)):
        real = prompts.token_id[i] >= 0
        expected = streams(any_model, torch.as_tensor(prompts.token_id[i][real]))
        found = whole["residual"].values[i]
        assert np.abs(found[:, real] - expected).max() <= 1e-4 * np.abs(expected).max()
        assert np.isnan(found[:, ~real]).all()
        at = expected[:, prompts.role[i][real] == "label"]
        found = labels["residual"].values[i]
        assert np.abs(found - at).max() <= 1e-4 * np.abs(expected).max()


def test_positions_that_are_kept(llama: tt.Model, prompts: tt.Prompts) -> None:
    whole = residual_streams(llama, prompts, keep="all")["residual"].values
    mask = (prompts.role == "last") | (prompts.demonstration == 0)
    found = residual_streams(llama, prompts, keep=mask)
    for i in range(len(prompts)):
        n = int(mask[i].sum())
        np.testing.assert_allclose(
            found["residual"].values[i][:, -n:], whole[i][:, mask[i]], rtol=1e-4, atol=1e-5
        )
        assert np.isnan(found["residual"].values[i][:, :-n]).all()
        assert found["role"].values[i, -n:].tolist() == prompts.role[i][mask[i]].tolist()
        assert set(found["role"].values[i, :-n]) <= {"pad"}
    last = residual_streams(llama, prompts, keep="last")
    assert last["role"].values.tolist() == [["last"]] * len(prompts)
    same = residual_streams(llama, prompts, keep=tt.at(role="last"))
    np.testing.assert_array_equal(same["residual"], last["residual"])
    assert '"role"' in same.attrs["settings"]


def test_positions_that_cannot_be_kept(llama: tt.Model, prompts: tt.Prompts) -> None:
    with pytest.raises(tt.errors.InputError, match="keep='first'"):
        residual_streams(llama, prompts, keep="first")
    with pytest.raises(tt.errors.InputError, match="keep selects no position"):
        residual_streams(llama, prompts, keep=np.zeros(prompts.token_id.shape, dtype=bool))
    with pytest.raises(tt.errors.InputError, match="boolean array of shape"):
        residual_streams(llama, prompts, keep=np.zeros((2, 2), dtype=bool))
