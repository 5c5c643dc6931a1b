"""Another default dtype of torch changes no number."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
import xarray as xr
from tiny import TWO, tiny

import twotower as tt

MEASURES: dict[str, Callable[[tt.Model, tt.Prompts], xr.Dataset]] = {
    "predict": lambda m, p: tt.predict(m, p, tt.KnockOut([(0, 1)], to=tt.Mean(p))),
    "effects": lambda m, p: tt.head_effects(m, p, "all", to=tt.Mean(p)),
    "attribution": tt.attribution,
    "gradient": tt.attribution_patching,
    "qk": tt.qk_similarity,
    "ov": lambda m, p: tt.ov_labels(m, p, top_tokens=[(1, 0)]),
    "shares": tt.measures.shares.attention_shares,
}


@pytest.mark.parametrize("name", ["gpt2", "llama-grouped"])
def test_float64_by_default(name: str) -> None:
    """Everything that is derived from the weights is made anew under it."""
    model = tiny(name)
    prompts = tt.build_prompts(model, TWO, shots=1, n=3)
    expected = {kind: measure(model, prompts) for kind, measure in MEASURES.items()}
    model.forget()
    torch.set_default_dtype(torch.float64)
    try:
        found = {kind: measure(model, prompts) for kind, measure in MEASURES.items()}
        tt.load(model.module, tokenizer=model.tokenizer)
    finally:
        torch.set_default_dtype(torch.float32)
        model.forget()
    for kind, dataset in found.items():
        for variable, values in dataset.data_vars.items():
            if values.dtype.kind == "f":
                assert values.dtype == expected[kind][variable].dtype
                np.testing.assert_allclose(values, expected[kind][variable], atol=1e-6)
