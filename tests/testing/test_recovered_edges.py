"""The edges of planted models are found, through the right tower, and nothing else is."""

from __future__ import annotations

import os

import pytest
from test_recovery import NAMES

import twotower as tt
from experiments.recovered_edges import class_pairs, recover
from twotower.testing import ARCHITECTURES, Planting

SEEDS = range(int(os.environ.get("TWOTOWER_PLANTINGS", "1")))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_gathering_feeds_matching(name: str, seed: int) -> None:
    found = recover(Planting.random(name, seed))
    assert found["accuracy"] == 1
    assert found["effects"] == found["pairs"] == 1
    # The rest goes through the norms, whose statistics depend on every write.
    assert found["strongest other"] < 0.05 * found["weakest planted"]
    assert found["share of pairs"] > 0.9


@pytest.mark.parametrize("name", NAMES)
def test_values_read_the_embedding(name: str) -> None:
    """Labels stand in the prompt: what matching heads write comes from the embedding alone."""
    planting = Planting(name, distractors={"silent": [(3, 0)]})
    model = planting.load()
    prompts = planting.prompts(model, n=8, shots=3)
    parts = tt.margin_parts(model, prompts, [*planting.match, (3, 0)])
    by_source = parts.margin_part.sum("position").mean("prompt").sel(chosen=str(planting.match[0]))
    embedding = float(by_source.sel(source="embedding"))
    assert embedding == pytest.approx(float(by_source.sum()), rel=0.02)
    assert float(abs(by_source.drop_sel(source="embedding")).max()) < 0.02 * embedding
    assert float(abs(parts.written.sel(chosen="3.0")).max()) < 0.02 * embedding


@pytest.mark.parametrize("name", NAMES)
def test_silent_heads_compare_the_same(name: str) -> None:
    """A silent head has both towers, though no edge into it has an effect."""
    silent = tt.Head(3, 0)
    planting = Planting(name, distractors={"silent": [silent]})
    model = planting.load()
    prompts = planting.prompts(model, n=8, shots=3)
    gather = str(planting.gather)
    pairs = class_pairs(model, prompts, [silent]).isel(chosen=0)
    assert float(pairs.sel(source=gather, key_source=gather)) > 0.9 * float(abs(pairs).sum())
    edges = tt.edge_effects(model, prompts, [planting.gather], [silent], positions="labels")
    assert float(abs(edges.margin_drop.sel(into=["q", "k"])).max()) < 0.02
