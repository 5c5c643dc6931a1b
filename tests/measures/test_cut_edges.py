"""Cut edges: one is what `edge_effects` says, and all edges that leave a head are the head."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from families import family_model
from tiny import THREE, TWO, byte_level, tiny

import twotower as tt
from twotower.edits.sources import all_sources
from twotower.models import Architecture

pytestmark = pytest.mark.usefixtures("one_thread")

FAMILIES = (
    "gemma2",
    "olmo2",
    "gpt_oss",
    "falcon+newalibi",
    "qwen3_next",
    "deepseek_v3",
    "gemma4_text+all",
    "granite",
    "gptj",
    "gpt2",
    "phi3",
    "nanochat",
)


def read_at(architecture: Architecture, layer: int, into: str) -> int:
    return layer if into == "q" else architecture.keys_of(layer)


def edges_of(model: tt.Model, sources: Sequence[str] | None = None) -> list[tuple[str, str, str]]:
    """Every edge from some sources into heads, and from those sources into the answer."""
    known = [one for one in all_sources(model) if sources is None or str(one) in sources]
    found = [
        (str(source), str(head), into)
        for source in known
        for head in model.heads
        for into in "qkv"
        if source.layer < read_at(model.architecture, head.layer, into)
    ]
    return found + [(str(source), "answer", "answer") for source in known]


def margin(model: tt.Model, prompts: tt.Prompts, edits: Any = ()) -> np.ndarray:
    return np.asarray(tt.predict(model, prompts, edits).margin.values)


@pytest.mark.parametrize("name", FAMILIES)
def test_one_edge_is_that_of_edge_effects(name: str) -> None:
    model = tt.load(family_model(name), tokenizer=byte_level())
    prompts = tt.build_prompts(model, THREE, shots=1, n=2, seed=2)[:1]
    clean = margin(model, prompts)
    places = {"positions": "labels", "outputs": "last"}
    found = tt.edge_effects(model, prompts, **places).margin_drop
    scale = float(abs(found).max())
    rng = np.random.default_rng(0)
    edges = [edge for edge in edges_of(model) if edge[1] != "answer"]
    for into in "qkv":
        own = [edge for edge in edges if edge[2] == into]
        chosen = [own[0], *(own[number] for number in rng.permutation(len(own))[:3])]
        for source, target, _ in chosen:  # the first: from the embedding into the lowest head
            after = margin(model, prompts, tt.CutEdges([(source, target, into)], **places))
            drop = found.sel(source=source, target=target, into=into).values
            np.testing.assert_allclose(clean - after, drop, atol=1e-4 * scale, err_msg=str(own))


def without_mlps(name: str) -> tt.Model:
    """A model whose MLPs write nothing, so that heads are read by heads and the answer alone."""
    model = tt.load(family_model(name), tokenizer=byte_level(), check=False)
    architecture = model.architecture
    layers = architecture.layers(model.module)
    with torch.no_grad():
        for layer, block in enumerate(layers):
            if architecture.has_mlp(layer):
                for parameter in architecture.mlp(block).parameters():
                    parameter.zero_()
    return model


@pytest.mark.parametrize("change", ["zero", "from"])
@pytest.mark.parametrize("name", ["gemma2", "gpt_oss", "falcon+newalibi", "gpt2", "llama"])
def test_all_edges_of_heads_are_the_heads(name: str, change: str) -> None:
    """In one run: the second head's edges are cut in a run that the first one's have changed."""
    model = without_mlps(name)
    prompts = tt.build_prompts(model, TWO, shots=2, n=3, seed=2)
    to = tt.Zero() if change == "zero" else tt.From(prompts.reversed_labels())
    heads = [model.heads[0], next(head for head in model.heads if head.layer > 0)]
    edit = tt.CutEdges(edges_of(model, [str(head) for head in heads]), "all", "all", to)
    expected = margin(model, prompts, tt.KnockOut(heads, "all", to))
    clean = margin(model, prompts)
    assert abs(clean - expected).max() > 1e-3
    np.testing.assert_allclose(
        margin(model, prompts, edit), expected, atol=1e-4 * abs(clean - expected).max()
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["mistral", "gemma2", "olmo2"])
def test_nothing_is_left_of_the_stream(name: str, dtype: torch.dtype) -> None:
    """Heads without biases that read nothing write nothing: no norm may amplify a rounding error.

    Cut are the values of the lowest layer, and everything that heads read and write.
    """
    model = tt.load(family_model(name).to(dtype), tokenizer=byte_level())
    prompts = tt.build_prompts(model, TWO, shots=2, n=3, seed=3)
    lowest = [head for head in model.heads if head.layer == 0]
    values = [("embedding", head, "v") for head in lowest]
    every = [edge for edge in edges_of(model) if edge[1] != "answer" or edge[0][0].isdigit()]
    for edges, where, heads in ((values, "last", lowest), (every, "all", model.heads)):
        expected = margin(model, prompts, tt.KnockOut(heads, where))
        assert abs(expected - margin(model, prompts)).max() > 0.1
        found = margin(model, prompts, tt.CutEdges(edges, outputs=where))
        np.testing.assert_allclose(found, expected, atol=1e-5 * abs(expected).max())


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
def test_little_is_left_of_the_stream(name: str) -> None:
    """All but 48 edges are cut: narrow dtypes lose no more than their own rounding."""
    found, kept = {}, None
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        # Not checked: with padding, attention in float64 is NaN in transformers itself.
        model = tt.load(family_model(name).to(dtype), tokenizer=byte_level(), check=False)
        prompts = tt.build_prompts(model, TWO, shots=2, n=1, seed=3)
        every = [edge for edge in edges_of(model) if edge[1] != "answer" or edge[0][0].isdigit()]
        if kept is None:
            kept = {int(i) for i in np.random.default_rng(0).permutation(len(every))[:48]}
        cut = tt.CutEdges([x for i, x in enumerate(every) if i not in kept], outputs="all")
        found[dtype] = (margin(model, prompts, cut), margin(model, prompts))
    exact = found[torch.float64]
    scale = float(np.abs(exact).max())
    for dtype, allowed in ((torch.float32, 1e-4), (torch.bfloat16, 0.05)):
        np.testing.assert_allclose(found[dtype][0], exact[0], atol=allowed * scale)


def test_answers_of_several_tokens_and_all_sources_at_once() -> None:
    model = tiny("llama-grouped")
    texts = ["a cat:", "two dogs:"]
    prompts = tt.contrast(model, texts, [" meow", " bark"], [" bark", " meow"])
    assert prompts.answers.several
    target = model.heads[-1]
    sources = [one for one in all_sources(model) if one.layer < target.layer]
    found = tt.edge_effects(model, prompts, [sources], [target], into="q").margin_drop
    cut = [(one, target, "q") for one in sources]
    drop = margin(model, prompts) - margin(model, prompts, tt.CutEdges(cut))
    np.testing.assert_allclose(drop, found.values.squeeze(), atol=1e-5)


def test_beside_other_edits() -> None:
    """Cuts into a head that is knocked out have no effect; attention cannot also be edited."""
    model = tiny("llama-grouped")
    prompts = tt.build_prompts(model, TWO, shots=2, n=3, seed=2)
    target = model.heads[-1]
    cut = tt.CutEdges([("embedding", target, "v"), ("mlp 0", target, "q")])
    out = tt.KnockOut([target])
    both = margin(model, prompts, [cut, out])
    np.testing.assert_allclose(both, margin(model, prompts, out), atol=1e-5)
    with pytest.raises(tt.errors.InputError, match=r"the attention of head .* is edited twice"):
        tt.predict(model, prompts, [cut, tt.ScaleAttention([target], 0.5, "labels")])
    about = tt.predict(model, prompts, cut).attrs["settings"]
    assert "CutEdges" in about
    assert "edges_hash" in about


@pytest.mark.parametrize(
    ("edges", "message"),
    [
        ([], "no edges"),
        (["0.1"], "write \\(source, target, into\\)"),
        ([("0.1", "2.0")], "write \\(source, target, into\\)"),
        ([("0.1", "2.0", "z")], "z"),
        ([("0.1", "answer", "q")], "q"),
        ([("0.1", "2.0", "answer")], "answer"),
        ([("2.1", "0.1", "q")], "lower layer than its target"),
        ([("0.1", "9.0", "q")], "9"),
        ([("mlp 9", "2.0", "q")], "mlp 9"),
        ([(None, "2.0", "q")], "None is not a source"),
        ([("0.1", {}, "q")], "head"),
        ([(["0.1", "0.2"], "2.0", "q")], "one source"),
        ([("0.1", "2.0", "q"), ((0, 1), (2, 0), "q")], "twice"),
    ],
)
def test_bad_edges(edges: Any, message: str) -> None:
    model = tiny("llama-grouped")
    prompts = tt.build_prompts(model, TWO, shots=1, n=2, seed=2)
    with pytest.raises(tt.errors.InputError, match=message):
        tt.predict(model, prompts, tt.CutEdges(edges))
