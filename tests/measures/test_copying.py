"""Tokens at the ends of a ranking are those of the whole vocabulary, whatever the sample shows."""

from __future__ import annotations

import pytest
import torch

from twotower.measures import copying
from twotower.measures.copying import TOP, own_token_ends
from twotower.walk.views import End

WIDTH, N_TOKENS, N = 12, 300, 400


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sampled", [4, 20, 1024])
def test_ends_of_the_whole_vocabulary(dtype, sampled: int, monkeypatch) -> None:
    monkeypatch.setattr(copying, "SAMPLED", sampled)
    monkeypatch.setattr(copying, "UNEMBED_BYTES", 8 * N_TOKENS * 7)
    generator = torch.Generator().manual_seed(0)
    unembedding = torch.nn.Linear(WIDTH, N_TOKENS, dtype=dtype)
    tokens = torch.randint(N_TOKENS, (N,), generator=generator)
    size = torch.randn(N, 1, generator=generator)
    vectors = size * unembedding.weight[tokens].detach().float()
    vectors = vectors + 0.3 * torch.randn(N, WIDTH, generator=generator)
    vectors[::10] = 0
    calls: list[int] = []

    def called(x: torch.Tensor) -> torch.Tensor:
        calls.append(len(x))
        return unembedding(x)

    logits = torch.zeros(1, N_TOKENS)
    end = End(vectors[:1], logits, None, called, dtype)
    with torch.no_grad():
        copied, suppressed = own_token_ends(vectors, tokens, end)
        rows = unembedding(vectors.to(dtype)) - unembedding.bias
    own = rows.gather(1, tokens[:, None])
    larger, smaller = (rows > own).sum(dim=-1), (rows < own).sum(dim=-1)
    equal = N_TOKENS - 1 - larger - smaller
    assert torch.equal(copied > 0, larger + equal / 2 < TOP)
    assert torch.equal(suppressed > 0, smaller + equal / 2 < TOP)
    assert 20 < copied.sum() < N
    assert 20 < suppressed.sum() < N
    assert not copied[::10].any()
    assert not suppressed[::10].any()
    # One vector without a token's bias, and probes if there is a sample.
    assert max(calls) <= 7
    if sampled == 20:
        assert sum(calls) < N
