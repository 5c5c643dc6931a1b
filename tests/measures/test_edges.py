"""Edges against two of transformers' own forwards for each, and what they add up to."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
import verify_edges
from families import ALONE, family_model
from tiny import THREE, TWO, byte_level, tiny

import twotower as tt
from twotower.edits.sources import all_sources
from twotower.edits.wiring import Wiring
from twotower.sweep import edges as sweep_edges

FEATURES = {
    "gemma2": ("labels", "norms before and after; softcap of scores; query factor; windows"),
    "olmo2": ("all", "norms after only; QK norm of the whole width"),
    "gpt_oss": ("labels", "sinks; experts; windows"),
    "falcon+newalibi": ("all", "ALiBi; fused and grouped; parallel with two norms"),
    "qwen3_next": ("labels", "layers without heads; output gate; partial rotary"),
    "deepseek_v3": ("all", "latent attention"),
    "gemma4_text+all": ("labels", "shared keys; per-layer embeddings; head sizes by layer"),
    "granite": ("all", "residual and logit multipliers; biases"),
    "gptj": ("labels", "one norm for attention and MLP; interleaved rotary"),
    "gpt2": ("all", "fused projections; learned positions"),
    "phi3": ("labels", "fused and grouped"),
}
"""What `make test` verifies, with its positions and the features that it has."""

SLOW = (
    "exaone4",
    "cohere2_moe",
    "falcon_h1",
    "laguna",
    "llama4+wrapped",
    "nemotron_h",
    "minicpm3",
    "qwen3",
    "stablelm",
)


def _cases() -> list[Any]:
    slow = [
        pytest.param(name, at, False, marks=pytest.mark.slow)
        for name in (*FEATURES, *SLOW)
        for at in ("all", "labels", "last")
    ]
    return [*((name, at, True) for name, (at, _) in FEATURES.items()), *slow]


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(("name", "positions", "few"), _cases())
def test_every_edge(name: str, positions: str, few: bool) -> None:
    model = tt.load(family_model(name), tokenizer=byte_level())
    n = 1 if name in ALONE else 2
    prompts = tt.build_prompts(model, THREE, shots=1, n=n, seed=2)
    assert n == 1 or len(set(prompts.lengths)) == 2  # one is padded
    assert verify_edges.edges(model, prompts, positions, few) < 1e-4


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("name", ["gemma2", pytest.param("llama", marks=pytest.mark.slow)])
@pytest.mark.parametrize("change", ["from", "mean"])
def test_other_outputs(name: str, change: str) -> None:
    model = tt.load(family_model(name), tokenizer=byte_level())
    prompts = tt.build_prompts(model, TWO, shots=1, n=3, seed=2)
    if change == "from":
        donors = prompts.reversed_labels()
        to = tt.From(donors)
        error = verify_edges.edges(
            model, prompts, "all", True, to, lambda i: verify_edges.Paths(model, donors, i)
        )
    else:
        reference = prompts[1:]
        to = tt.Mean(reference)
        error = verify_edges.edges(
            model,
            prompts,
            "all",
            True,
            to,
            lambda i: verify_edges.Average(model, reference, prompts, i),
        )
    assert error < 1e-4


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("name", ["gpt_oss", pytest.param("gemma2", marks=pytest.mark.slow)])
@pytest.mark.parametrize("outputs", ["labels", pytest.param("all", marks=pytest.mark.slow)])
def test_outputs_at_other_positions(name: str, outputs: str) -> None:
    model = tt.load(family_model(name), tokenizer=byte_level())
    prompts = tt.build_prompts(model, TWO, shots=1, n=2, seed=2)
    assert verify_edges.edges(model, prompts, "all", True, outputs=outputs) < 1e-4


@pytest.mark.usefixtures("one_thread")
def test_answers_of_several_tokens() -> None:
    model = tiny("llama-grouped")
    texts = ["cat: foo\ndog:", "Paris: bar\ncat: foo\nowl:"]
    prompts = tt.contrast(model, texts, [" foo bar", " bar"], [" bar foo map", " one two"])
    assert prompts.answers.several
    assert verify_edges.edges(model, prompts, "all", True) < 1e-4


@pytest.mark.parametrize(
    ("name", "dtype", "several"),
    [
        ("mistral", torch.float32, False),
        ("mistral", torch.float32, True),
        ("mistral", torch.bfloat16, False),
        ("gemma2", torch.float32, False),
        ("gemma2", torch.bfloat16, False),
    ],
)
def test_everything_out_of_what_is_read(name: str, dtype: torch.dtype, several: bool) -> None:
    """Without biases nothing is left: values of 0 are a knock-out, keys and queries of 0 alike."""
    model = tt.load(family_model(name).to(dtype), tokenizer=byte_level())
    prompts = tt.build_prompts(model, TWO, shots=1, n=3, seed=1)
    if several:
        right = [f" {gold} one" for gold in prompts.gold]
        prompts = tt.contrast(model, prompts.strings, right, [" two"] * 3)
    effects = tt.head_effects(model, prompts).margin_drop
    layer = model.n_layers - 1
    below = [str(source) for source in all_sources(model, layer)]
    targets = [(layer, head) for head in range(model.n_heads)]
    found = tt.edge_effects(model, prompts, [below], targets).margin_drop.isel(source=0)
    size = float(abs(effects).max())
    if dtype == torch.bfloat16:  # the rows' own rounding
        size = 100 * float(abs(tt.predict(model, prompts).margin).max())
    assert abs(found.sel(into="v") - effects.isel(layer=layer).values).max() < 1e-4 * size
    assert abs(found.sel(into="k") - found.sel(into="q")).max() < 1e-4 * size
    assert abs(found.sel(into="k")).max() > (0.01 if dtype == torch.float32 else 1e-4) * size


def test_chunks_and_batches_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama-grouped")
    prompts = tt.build_prompts(model, THREE, shots=1, n=4, seed=2)
    whole = tt.edge_effects(model, prompts)
    spans, starts = sweep_edges._spans, set()

    def watched(chunks: Any) -> Any:
        found = spans(chunks)
        starts.update(start for by_layer in found for start, _ in by_layer.values())
        return found

    monkeypatch.setattr(sweep_edges, "_spans", watched)
    with tt.set_options(batch_size=1, memory_budget="600KiB"):
        parts = tt.edge_effects(model, prompts)
    assert len(starts) > 1  # chunks that begin inside a layer
    with tt.set_options(batch_size=1, memory_budget="600KiB", proof=False):
        unproved = tt.edge_effects(model, prompts)
    np.testing.assert_allclose(unproved.margin_drop, parts.margin_drop, rtol=0, atol=1e-6)
    assert abs(whole - parts).margin_drop.max() < 1e-5 * abs(whole).margin_drop.max()


def test_a_draw_of_one_prompt_is_a_donor() -> None:
    model = tiny("gpt2")
    words = tt.Task("words", {"animal": ["cat", "dog", "owl"], "tool": ["saw", "one", "two"]})
    prompts = tt.build_prompts(model, words, shots=1, n=3, seed=1)
    drawn, given = tt.Resample(prompts[2:]), tt.From(prompts[[2, 2]])
    found, expected = (tt.edge_effects(model, prompts[:2], to=to) for to in (drawn, given))
    np.testing.assert_array_equal(found.margin_drop, expected.margin_drop)
    nothing = tt.edge_effects(model, prompts[:2], to=tt.Times(1.0))
    assert abs(nothing.margin_drop).max() < 1e-5


def test_what_is_recorded() -> None:
    model = tiny("gpt2")
    prompts = tt.build_prompts(model, TWO, shots=1, n=2, seed=1)
    found = tt.edge_effects(
        model, prompts, ["embedding", (0, 1), ["0.2", "mlp 0"]], [(1, 0), (0, 0)]
    )
    assert list(found.source.values) == ["embedding", "0.1", "0.2 + mlp 0"]
    assert list(found.target.values) == ["1.0", "0.0"]
    assert found.margin_drop.sel(target="0.0").notnull().any(
        ("prompt", "into")
    ).values.tolist() == [
        True,
        False,
        False,
    ]
    assert found.attrs["not_finite_values"] == 0
    assert "unchanged edge" in found.attrs["proof"]
    at_labels = tt.edge_effects(model, prompts, None, [(1, 0)], outputs="labels")
    assert json.loads(at_labels.attrs["settings"])["outputs"] == "labels"


@pytest.mark.parametrize("into", ["q", "k", "v"])
def test_a_fault_in_what_is_read_again(into: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama-grouped")
    prompts = tt.build_prompts(model, TWO, shots=1, n=2, seed=1)
    project = Wiring.project

    def faulty(wiring: Wiring, *given: Any) -> Any:
        found = project(wiring, *given)
        return 1.01 * found if given[-1] == into else found

    tt.edge_effects(model, prompts, None, [(2, 0)], into=into)
    monkeypatch.setattr(Wiring, "project", faulty)
    with pytest.raises(tt.errors.CheckError, match="reads the unchanged stream once more"):
        tt.edge_effects(model, prompts, None, [(2, 0)], into=into)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sources": ["mlp 7"]}, "no source 'mlp 7'"),
        ({"sources": ["head 3"]}, "'head 3' is not a source"),
        ({"sources": [(9, 0)]}, "out of range"),
        ({"sources": "mlp"}, "must be a list"),
        ({"sources": [(0, 1), "0.1"]}, "given twice"),
        ({"sources": [[]]}, "empty"),
        ({"sources": [["0.1", (0, 1)]]}, "given twice"),
        ({"sources": [(2, 0)], "targets": [(1, 0)]}, "lower layer than its target"),
        ({"sources": [(1, 0)], "targets": [(1, 1)]}, "lower layer than its target"),
        ({"targets": ["mlp 1"]}, "not a head"),
        ({"targets": []}, "no targets"),
        ({"into": "mlp"}, "into"),
        ({"into": ["q", "q"]}, "each once"),
        ({"to": 0.0}, "is not a change"),
        ({"positions": "nowhere"}, "nowhere"),
        ({"outputs": "nowhere"}, "nowhere"),
    ],
)
def test_bad_input(arguments: dict[str, Any], message: str) -> None:
    model = tiny("gpt2")
    prompts = tt.build_prompts(model, TWO, shots=1, n=2, seed=1)
    with pytest.raises(tt.errors.InputError, match=message):
        tt.edge_effects(model, prompts, **arguments)
