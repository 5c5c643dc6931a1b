"""`towers_of` equals the same measures of queries, keys and values from transformers' forwards."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from families import family_model
from tiny import TWO, byte_level, tiny
from verify_edges import Paths

import twotower as tt

TARGETS = [(2, 1), (1, 3)]


def auc(values: np.ndarray, high: np.ndarray, low: np.ndarray) -> float:
    if not high.any() or not low.any():
        return np.nan
    pairs = values[high][:, None] - values[low][None]
    return float(((pairs > 0) + 0.5 * (pairs == 0)).mean())


def expected(one: Paths, prompts: tt.Prompts, number: int, read: tuple, head: int) -> dict:
    """QK AUC, attention and OV AUC of a head, from what reaches its attention."""
    real = prompts.token_id[number] >= 0
    at = np.flatnonzero(prompts.where("labels")[number][real])
    same = (prompts.demonstration_class[number] == prompts.query_class[number])[real][at]
    q, k, v = (x[0].double() for x in read)
    q, k, v = q[head, -1], k[head // (len(q) // len(k))], v[head // (len(q) // len(v))]
    scores = (k @ q).numpy() * one.architecture.scaling(2)
    weights = np.exp(scores - scores.max())
    weights = weights / weights.sum()
    layer = next(layer for layer, own in TARGETS if own == head)
    projection = one.architecture.projection(one.blocks[layer])
    alone = torch.zeros(len(at), one.architecture.heads_in(layer), v.shape[-1]).double()
    alone[:, head] = v[at]
    written = alone.flatten(1) @ projection.weight.double().T
    norm = one.architecture.final_norm(one.module)
    pulled = written * norm.weight.double()
    logits = (pulled @ one.module.lm_head.weight.double()[prompts.label_ids,].T).detach().numpy()
    texts = prompts.label_text[number][real][at]
    aucs = []
    for label, text in enumerate(prompts.labels):
        others = (logits.sum(axis=1) - logits[:, label]) / (len(prompts.labels) - 1)
        aucs.append(auc(logits[:, label] - others, texts == text, texts != text))
    return {
        "qk_auc": auc(scores[at], same, ~same),
        "class_attention": float(weights[at][same].sum()),
        "ov_auc": float(np.nanmean(aucs)),
    }


@pytest.mark.usefixtures("one_thread")
def test_against_forwards() -> None:
    model = tt.load(family_model("llama"), tokenizer=byte_level())
    prompts = tt.build_prompts(model, TWO, shots=2, n=2, seed=2)
    assert len(set(prompts.lengths)) == 2
    found = tt.towers_of(model, prompts, TARGETS)
    compared = 0
    for number in range(2):
        one = Paths(model, prompts, number)
        here = torch.as_tensor(prompts.where("labels")[number][one.real])
        last = torch.arange(len(here)) == len(here) - 1
        for layer, head in TARGETS:
            own = one.read(layer, layer, torch.zeros_like(one.streams[0]))
            target = f"{layer}.{head}"
            clean = expected(one, prompts, number, own, head)
            for name, value in clean.items():
                assert found[name].sel(target=target).values[number] == pytest.approx(
                    value, abs=1e-5
                )
            for source, (of, _) in one.sources.items():
                if of >= layer:
                    continue
                for place, into in enumerate("qkv"):
                    at = last if into == "q" else here
                    new = one.read(layer, layer, one.lost(source, layer) * at[None, :, None])
                    read = tuple(new[i] if i == place else own[i] for i in range(3))
                    after = expected(one, prompts, number, read, head)
                    for name in ("ov_auc",) if into == "v" else ("qk_auc", "class_attention"):
                        drop = found[f"{name}_drop"].sel(source=source, target=target, into=into)
                        assert drop.values[number] == pytest.approx(
                            clean[name] - after[name], abs=1e-5
                        )
                        compared += 1
    assert compared == 2 * 5 * (6 + 11)  # the embedding, heads and MLPs below layers 1 and 2


def test_written_equals_attribution() -> None:
    model = tiny("gpt2")
    prompts = tt.build_prompts(model, TWO, shots=1, n=3, seed=1)
    found = tt.towers_of(model, prompts, [(1, 2)], ["embedding"])
    logits = tt.attribution(model, prompts).label_logit.sel(layer=1, head=2)
    own = logits.transpose("prompt", "label").values
    right = own[np.arange(3), prompts.gold_index]
    wrong = own[np.arange(3), 1 - prompts.gold_index]
    np.testing.assert_allclose(found.written.values[:, 0], right - wrong, atol=1e-5)


def test_prompts_without_classes() -> None:
    model = tiny("gpt2")
    prompts = tt.contrast(model, ["cat dog", "owl"], [" foo", " bar"], [" bar", " foo"])
    with pytest.raises(tt.errors.InputError, match="classes of demonstrations"):
        tt.towers_of(model, prompts, [(1, 0)])
