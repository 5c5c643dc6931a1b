"""Planted models do what they are said to do, in every family, and are ordinary checkpoints."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import twotower as tt
from twotower.testing import ARCHITECTURES, DISTRACTORS, Planting
from twotower.testing.coordinates import Coordinates, directions
from twotower.testing.families import WINDOW
from twotower.testing.mechanism import ON_LABELS

MATCH = (tt.Head(2, 1), tt.Head(3, 2))
OTHERS = {"silent": [(3, 0)], "loud": [(2, 3)], "recent": [(3, 3)]}


@pytest.fixture(params=ARCHITECTURES)
def planting(request: pytest.FixtureRequest) -> Planting:
    return Planting(request.param, match=MATCH, distractors=OTHERS)


def test_it_does_the_task(planting: Planting) -> None:
    for n_classes in (2, 3, 8):
        one = Planting(planting.architecture, n_classes=n_classes, match=MATCH, d_head=64)
        model = one.load()
        answers = tt.predict(model, one.prompts(model, n=40, shots=2))
        assert answers.top1_correct.values.all()
        assert len(set(answers.gold.values.tolist())) == n_classes


def test_attention_and_margin_are_those_of_the_construction(planting: Planting) -> None:
    """Predicted on paper: softmax of the (capped) similarity, times the gain."""
    for similarity in (2.0, 8.0):
        one = Planting(planting.architecture, match=MATCH, similarity=similarity)
        model = one.load()
        prompts = one.prompts(model, n=12, shots=3)
        run = tt.analyze(model, prompts, measures=("predictions", "qk"))
        own = math.exp(capped(model, ON_LABELS + similarity) - capped(model, ON_LABELS))
        share = own / (3 * own + 3)  # of one label of the query's class; others have exp(0)
        for head in MATCH:
            attention = run.tt.head(*head).qk.attention
            same = (attention.role == "label") & (
                attention.demonstration_class == attention.query_class
            )
            found = attention.values[same.values]
            # Norms shrink all features a little, so that similarity is a little less.
            np.testing.assert_allclose(found, share, rtol=0.12)
        margin = one.gain * (3 * share - (1 - 3 * share))
        assert float(run.predictions.margin.mean()) == pytest.approx(margin, rel=0.25)


def capped(model: tt.Model, score: float) -> float:
    cap = model.architecture.score_softcap
    return score if cap is None else cap * math.tanh(score / cap)


def test_the_gathering_head_looks_at_the_text(planting: Planting) -> None:
    model = planting.load()
    prompts = planting.prompts(model, n=8, shots=4)
    run = tt.analyze(model, prompts, measures=("qk",))
    attention = run.tt.head(*planting.gather).qk.attention
    assert (attention.sel(position=-1).values > 0.99).all()  # the query's text
    shares = tt.measures.shares.attention_shares(model, prompts, "labels").sel(
        layer=planting.gather.layer, head=planting.gather.head
    )
    assert (shares.share.sel(source="own text").values > 0.99).all()


def test_distractors_are_what_they_are_called(planting: Planting) -> None:
    model = planting.load()
    run = tt.analyze(model, planting.prompts(model, n=32, shots=3))
    silent, loud, recent = (run.tt.head(*OTHERS[kind][0]) for kind in DISTRACTORS)
    match = run.tt.head(*MATCH[0])
    np.testing.assert_allclose(silent.qk.attention.values, match.qk.attention.values, atol=0.04)
    assert float(np.abs(silent.ov.label_logit).max()) < 1e-5
    assert float(silent.scores.qk_auc) == 1.0
    assert float(silent.scores.ov_auc) == 0.5
    assert float(loud.scores.ov_auc) == 1.0
    labels = loud.qk.attention.values[(loud.qk.role == "label").values]
    np.testing.assert_allclose(labels, 1 / 6, rtol=0.02)
    assert float(recent.scores.ov_auc) == 1.0
    weights = recent.qk.attention.where(recent.qk.role == "label")
    for one in weights.values:
        here = one[np.isfinite(one)]
        assert (np.diff(here) > 0).all()  # the nearer, the more
    for kind in (silent, loud):
        assert float(np.abs(kind.effects.margin_drop.mean())) < 0.1


@pytest.mark.parametrize("name", ["gemma2", "olmo2"])
def test_norms_after_attention_let_all_pass_but_the_ballast(name: str) -> None:
    planting = Planting(name, match=MATCH, distractors=OTHERS, noise=0.1)
    model = planting.load()
    tokens = torch.tensor(planting.prompts(model, n=1, shots=2).token_id)
    inputs: list[torch.Tensor] = []
    for layer in model.module.model.layers:
        layer.self_attn.o_proj.register_forward_pre_hook(lambda m, z: inputs.append(z[0]))
    with torch.no_grad():
        states = model.module(tokens, output_hidden_states=True).hidden_states
        for layer, z in zip(model.module.model.layers, list(inputs), strict=True):
            bare = z @ layer.self_attn.o_proj.weight.T
            written = layer.post_attention_layernorm(layer.self_attn.o_proj(z))
            torch.testing.assert_close(written[..., 2:], bare[..., 2:], rtol=1e-3, atol=1e-4)
    for state in states[1:-1]:
        # The noise of MLPs alone adds to the constant.
        torch.testing.assert_close(state[..., :2], states[0][..., :2], rtol=0.01, atol=0)


def test_local_layers_see_a_window() -> None:
    planting = Planting("gemma2", match=MATCH)
    model = planting.load()
    prompts = planting.prompts(model, n=4, shots=10)
    assert prompts.n_positions > WINDOW
    run = tt.analyze(model, prompts, measures=("predictions", "qk"))
    local, whole = (run.tt.head(*head).qk.attention for head in MATCH)
    assert (local.values[:, :-WINDOW] == 0).all()
    assert (whole.values[:, :-WINDOW].max(axis=1) > 0.05).all()
    assert run.predictions.top1_correct.values.all()


@pytest.mark.parametrize("kind", DISTRACTORS)
def test_heads_that_share_keys_and_values(kind: str) -> None:
    """Grouped queries: a distractor beside a matching head reads the same keys and values."""
    one = Planting("llama", match=[(2, 0)], distractors={kind: [(2, 1)]}, n_heads=4)
    model = one.load()
    assert model.n_kv_heads == 2
    run = tt.analyze(model, one.prompts(model))
    assert set(run.tt.heads(2)) == {one.gather, tt.Head(2, 0)}


def test_an_ordinary_checkpoint(planting: Planting, tmp_path: Path) -> None:
    folder = planting.save(tmp_path / "planted")
    ids = AutoTokenizer.from_pretrained(folder)("a1: foo\nb2: bar\na3:", return_tensors="pt")
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(folder)(**ids).logits[0, -1]
    assert AutoTokenizer.from_pretrained(folder).decode(logits.argmax()) == " foo"
    loaded, built = tt.load(folder), planting.load()
    prompts = planting.prompts(built, n=4)
    before, after = (tt.head_effects(m, prompts).margin_drop for m in (built, loaded))
    np.testing.assert_array_equal(before.values, after.values)


def test_the_same_seed_gives_the_same_weights() -> None:
    for name in ARCHITECTURES:
        one, same = (Planting.random(name, 3, noise=0.2) for _ in range(2))
        other = Planting.random(name, 4, noise=0.2)
        assert one == same
        assert one != other
        for a, b in zip(one.module().parameters(), same.module().parameters(), strict=True):
            assert torch.equal(a, b)


def test_noise_has_its_size() -> None:
    clean, noisy = (Planting("llama", noise=noise).module() for noise in (0.0, 0.3))
    for (name, a), b in zip(clean.named_parameters(), noisy.parameters(), strict=True):
        if a.dim() == 2 and ".layers." in name:
            deviation = float((b - a).std()) * math.sqrt(128)
            assert deviation == pytest.approx(0.3, rel=0.05)
        else:
            assert torch.equal(a, b)


def test_directions_survive_the_norms() -> None:
    x = Coordinates(directions(8, 4), 128)
    vectors = torch.stack([x[name] for name in x.index])
    torch.testing.assert_close(vectors @ vectors.T, torch.eye(len(vectors)))
    torch.testing.assert_close(vectors.mean(dim=1), torch.zeros(len(vectors)))
    with pytest.raises(ValueError, match="d_model"):
        Coordinates(directions(8, 4), 64)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"architecture": "bert"}, "architecture='bert'"),
        ({"n_layers": 1}, "n_layers=1"),
        ({"n_classes": 1}, "n_classes=1"),
        ({"n_classes": 9}, "n_classes=9"),
        ({"d_head": 16}, "d_head=16"),
        ({"noise": math.nan}, "noise=nan"),
        ({"match": ()}, "at least one matching head"),
        ({"match": [(1, 1)]}, "later layers"),
        ({"match": [(2, 1), (2, 1)]}, "same layer and number"),
        ({"match": [(4, 1)]}, "layer of a head=4"),
        ({"match": [(2, 4)]}, "head=4"),
        ({"distractors": {"quiet": []}}, "silent, loud, recent"),
        ({"distractors": {"loud": [(1, 0)]}}, "same layer and number"),
    ],
)
def test_what_cannot_be_planted(settings: dict[str, object], words: str) -> None:
    with pytest.raises(tt.errors.InputError, match=words):
        Planting(**settings)  # type: ignore[arg-type]
