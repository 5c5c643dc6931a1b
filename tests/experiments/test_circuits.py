"""The circuit of in-context classification: shares of the margin kept, and each verdict."""

from __future__ import annotations

import importlib

import numpy as np
import pytest
import xarray as xr
from tiny import TWO, tiny

import twotower as tt
from twotower.edits.cut import ANSWER, all_edges

PART = importlib.import_module("experiments.circuits")
N, LAYERS, HEADS = 20, 10, 4
SIZES = (2, 4, 16)


def run(
    kept: float, random: float = 0.1, indirect: bool = True, by_edges: float = 0.4
) -> xr.DataTree:
    """A run in which 4 of 40 heads keep a share of a margin of 2, and random heads another."""
    noise = 0.02 * np.random.default_rng(0).normal(size=(N, len(PART.RANKINGS), len(SIZES)))
    shares = np.full((len(PART.RANKINGS), len(SIZES)), kept)
    shares[:, 0] /= 2
    shares[PART.RANKINGS.index("random")] = random
    about = xr.Dataset(
        {
            "margin": (("prompt", "ranking", "size"), 2 * shares - 1 + noise),
            "margin_clean": ("prompt", np.ones(N)),
            "margin_without": ("prompt", -np.ones(N)),
            "kept": (("ranking", "size"), shares),
            "area": ("ranking", shares.mean(axis=1)),
        },
        {"ranking": list(PART.RANKINGS), "size": list(SIZES)},
    )
    edges = [
        ("3.1", "answer", "answer", 0.5),
        ("1.0", "3.1", "q", 0.3),
        ("mlp 2", "3.1", "k", -0.4),
    ]
    circuit = xr.Dataset(
        {
            "effect": (("prompt", "edge"), np.tile([x[3] for x in edges], (N, 1))),
            "mean_effect": ("edge", [x[3] for x in edges]),
            "source_name": ("edge", [x[0] for x in edges]),
            "target_name": ("edge", [x[1] for x in edges]),
            "tower": ("edge", [x[2] for x in edges]),
        }
    )
    edges_kept = xr.Dataset(
        {
            "margin": (
                ("prompt", "ranking", "size"),
                np.full((N, len(PART.EDGE_RANKINGS), 2), by_edges),
            ),
            "margin_clean": ("prompt", np.ones(N)),
            "margin_without": ("prompt", -np.ones(N)),
        },
        {"ranking": list(PART.EDGE_RANKINGS), "size": [2, 8]},
    )
    named = np.full((LAYERS, HEADS), "", dtype=object)
    named[1, 0] = "induction, copying"
    kinds = xr.Dataset(
        {"kind": (("layer", "head"), named)},
        {"layer": np.arange(LAYERS), "head": np.arange(HEADS)},
    )
    words = ["classification", PART.INDIRECT] if indirect else ["classification"]
    parts = {"circuit": circuit, PART.HEADS: about, PART.EDGES: edges_kept}
    groups = {f"{x}_{part}": one for x in words for part, one in parts.items()}
    return xr.DataTree.from_dict({**groups, "kinds": kinds})


@pytest.mark.parametrize(
    ("kept", "random", "verdict"),
    [
        (0.9, 0.1, "supported"),
        (0.6, 0.1, "not supported"),
        (0.8, 0.1, "undecided"),
        (0.9, 0.95, "undecided"),
    ],
)
def test_verdicts(kept: float, random: float, verdict: str) -> None:
    assert PART.judge([run(kept, random)] * 3).verdict == verdict


def test_a_seed_below_leaves_it_undecided() -> None:
    assert PART.judge([run(0.95), run(0.95), run(0.75)]).verdict == "undecided"


def test_numbers() -> None:
    found = PART.judge([run(0.9)] * 3)
    share = found.numbers["classification: share kept by 4 heads, circuit"]
    assert share.value == pytest.approx(0.9, abs=0.01)
    assert share.n == 3 * N
    assert found.numbers["classification: share kept beyond random heads"].value == pytest.approx(
        0.8, abs=0.01
    )
    rows = found.tables["Strongest edges, classification"]["rows"]
    assert [row[0] for row in rows] == ["3.1 to answer", "mlp 2 to 3.1", "1.0 to 3.1"]
    assert (
        rows[2][4] == "copying, induction; no kind" or rows[2][4] == "induction, copying; no kind"
    )
    assert rows[1][4] == "mlp; no kind"


def test_edges_that_keep_the_margin() -> None:
    """A circuit of three edges is said to keep two of them, not eight."""
    found = PART.judge([run(0.9)] * 2)
    share = found.numbers["classification: share kept by 8 edges, effect"]
    assert share.value == pytest.approx(0.7)
    assert "classification: share kept by 8 edges, circuit" not in found.numbers
    rows = found.tables["Edges that keep the margin, classification"]["rows"]
    assert [row[0] for row in rows] == ["2", "8"]
    assert rows[1][1] == ""
    assert "edges" not in found.reason  # 0.7 of the margin is not enough


def test_edges_that_are_enough() -> None:
    reason = PART.judge([run(0.9, by_edges=0.8)] * 2).reason
    assert "the 2 of largest effect are the first to keep as much: 0.90" in reason
    assert "as many random ones keep 0.90" in reason


def test_all_edges_are_ranked() -> None:
    model = tiny("llama-grouped")
    prompts = tt.build_prompts(model, TWO, shots=1, n=4, seed=0)
    ranked = PART.edges_by_effect(model, prompts)
    assert sorted(ranked) == sorted((str(a), str(b), c) for a, b, c in all_edges(model))
    effects = tt.edge_effects(model, prompts, to=tt.Mean(prompts)).margin_drop.mean("prompt")
    into_heads = [edge for edge in ranked if edge[2] != ANSWER]
    sizes = [abs(float(effects.sel(source=a, target=b, into=c))) for a, b, c in into_heads]
    assert sizes == sorted(sizes, reverse=True)


def test_without_indirect_objects() -> None:
    found = PART.judge([run(0.9), run(0.9, indirect=False)])
    assert not any(name.startswith(PART.INDIRECT) for name in found.numbers)
