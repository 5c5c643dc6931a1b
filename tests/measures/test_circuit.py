"""Circuits: their edges are those of `edge_effects`, and how much of the margin they keep."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import networkx as nx
import numpy as np
import pytest
import xarray as xr
from tiny import TWO, tiny

import twotower as tt
from twotower.edits.cut import all_edges
from twotower.measures.faithfulness import LISTED

OPTIONS = {"threshold": 0.0, "writers": 3, "edges": 20, "depth": 2}


@pytest.fixture(scope="module")
def found() -> tuple[tt.Model, tt.Prompts, xr.Dataset]:
    model = tiny("llama-grouped")
    prompts = answered(model)
    return model, prompts, tt.circuit(model, prompts, **OPTIONS)


def answered(model: tt.Model) -> tt.Prompts:
    """Prompts that a random model happens to answer."""
    prompts = tt.build_prompts(model, TWO, shots=1, n=24, seed=0)
    return prompts[np.flatnonzero(tt.predict(model, prompts).margin.values > 0)]


def test_edges_are_exact_and_ordered(found: tuple[tt.Model, tt.Prompts, xr.Dataset]) -> None:
    model, prompts, circuit = found
    into = circuit.tower.values != "answer"
    assert 1 <= (~into).sum() <= 3
    assert into.sum() >= 5
    heads = [name for name in set(circuit.target_name.values) if name != "answer"]
    exact = tt.edge_effects(model, prompts, None, [_head(n) for n in heads], positions="labels")
    written = tt.attribution(model, prompts).label_logit
    for edge in range(circuit.sizes["edge"]):
        one = circuit.isel(edge=edge)
        source, target, tower = (
            str(one[name].item()) for name in ("source_name", "target_name", "tower")
        )
        assert str(one.target_at.item()) == "last"
        assert str(one.source_at.item()) == ("labels" if tower in "kv" else "last")
        if tower == "answer":
            layer, head = _head(source)
            own = written.sel(layer=layer, head=head).transpose("prompt", "label").values
            rows, gold = np.arange(len(prompts)), prompts.gold_index
            expected = own[rows, gold] - own[rows, 1 - gold]
        else:
            expected = exact.margin_drop.sel(source=source, target=target, into=tower).values
        np.testing.assert_allclose(one.effect.values, expected, atol=1e-5)
        assert float(one.mean_effect) == pytest.approx(expected.mean(), abs=1e-5)
        assert float(one.low) * float(one.high) > 0
        assert float(one.low) <= float(one.mean_effect) <= float(one.high)
    strengths = abs(circuit.mean_effect.values)
    assert (np.diff(strengths[~into]) <= 1e-9).all()
    assert (strengths[~into].mean() > circuit.chance.values[~into]).all()


def _head(name: str) -> tuple[int, int]:
    layer, head = name.split(".")
    return int(layer), int(head)


def test_threshold_and_budget(found: tuple[tt.Model, tt.Prompts, xr.Dataset]) -> None:
    model, prompts, _ = found
    few = tt.circuit(model, prompts, **{**OPTIONS, "threshold": 0.05, "edges": 4})
    assert few.sizes["edge"] <= 4
    margin = tt.predict(model, prompts).margin.values.mean()
    assert (abs(few.mean_effect) >= 0.05 * margin - 1e-6).all()


def test_before_the_last_position(found: tuple[tt.Model, tt.Prompts, xr.Dataset]) -> None:
    """Heads that act at label positions are searched too, by changes of their outputs there."""
    model, prompts, _ = found
    options = {**OPTIONS, "edges": 60, "before_last": True}
    circuit = tt.circuit(model, prompts, **options)
    there = circuit.isel(edge=np.flatnonzero(circuit.target_at.values == "labels"))
    assert there.sizes["edge"]
    one = there.isel(edge=0)
    exact = tt.edge_effects(
        model, prompts, None, [_head(str(one.target_name.item()))], outputs="labels"
    )
    expected = exact.margin_drop.sel(source=str(one.source_name.item()), into=str(one.tower.item()))
    np.testing.assert_allclose(one.effect.values, expected.isel(target=0).values, atol=1e-5)


def test_positions_of_a_user_before_the_last(
    found: tuple[tt.Model, tt.Prompts, xr.Dataset],
) -> None:
    model, prompts, _ = found
    options = {**OPTIONS, "edges": 40, "before_last": True}
    named, given = (
        tt.circuit(model, prompts, positions=at, **options)
        for at in ("labels", tt.at(role="label"))
    )
    np.testing.assert_array_equal(named.effect, given.effect)
    assert set(given.target_at.values) == {"last", "positions"}


def test_a_budget_below_the_writers(found: tuple[tt.Model, tt.Prompts, xr.Dataset]) -> None:
    model, prompts, _ = found
    few = tt.circuit(model, prompts, **{**OPTIONS, "edges": 2})
    assert few.sizes["edge"] <= 2


def test_faithfulness(found: tuple[tt.Model, tt.Prompts, xr.Dataset]) -> None:
    model, prompts, circuit = found
    heads = tt.measures.circuit.circuit_heads(circuit)
    assert len(heads) == len(set(heads))
    prompts = tt.build_prompts(model, TWO, shots=1, n=24, seed=3)
    nothing = tt.predict(model, prompts, tt.KnockOut(model.heads, "all"))
    clean = tt.predict(model, prompts).margin.values
    prompts = prompts[np.flatnonzero(clean > nothing.margin.values + 0.1)]
    rankings = {"circuit": heads, "all": model.heads}
    kept = tt.faithfulness(model, prompts, rankings, sizes=(1, 2, len(model.heads)), to=tt.Zero())
    clean = tt.predict(model, prompts).margin.values
    np.testing.assert_allclose(kept.margin_clean, clean, atol=1e-5)
    whole = kept.margin.sel(ranking="all", size=len(model.heads))
    np.testing.assert_allclose(whole, clean, atol=1e-5)
    assert float(kept.kept.sel(ranking="all", size=len(model.heads))) == pytest.approx(1)
    others = [head for head in model.heads if head not in heads[:2]]
    edit = tt.KnockOut(others, "all")
    expected = tt.predict(model, prompts, edit).margin.values
    np.testing.assert_allclose(kept.margin.sel(ranking="circuit", size=2), expected, atol=1e-5)
    share = kept.kept.sel(ranking="all").values
    logs = np.log2([1, 2, len(model.heads)])
    area = ((share[1:] + share[:-1]) / 2 * np.diff(logs)).sum() / (logs[-1] - logs[0])
    assert float(kept.area.sel(ranking="all")) == pytest.approx(area)


def test_faithfulness_of_edges(found: tuple[tt.Model, tt.Prompts, xr.Dataset]) -> None:
    """All edges but those that are kept are cut."""
    model, prompts, circuit = found
    every = [tuple(map(str, edge)) for edge in all_edges(model)]
    order = np.argsort(-abs(circuit.mean_effect.values))
    names = ("source_name", "target_name", "tower")
    own = [tuple(str(circuit[name].values[i]) for name in names) for i in order]
    rankings = {"circuit": circuit, "all": every}
    kept = tt.faithfulness(model, prompts, rankings, sizes=(2, len(every)))
    settings = json.loads(kept.attrs["settings"])
    assert settings["ranked"] == {"circuit": len(own), "all": len(every)}
    assert settings["rankings"]["all"] == [" ".join(edge) for edge in every[:LISTED]]
    clean = tt.predict(model, prompts).margin.values
    np.testing.assert_allclose(kept.margin_clean, clean, atol=1e-5)
    np.testing.assert_allclose(kept.margin.sel(ranking="all", size=len(every)), clean, atol=1e-5)
    for margin, keeping in (
        (kept.margin.sel(ranking="circuit", size=2), own[:2]),
        (kept.margin.sel(ranking="circuit", size=len(every)), own),
        (kept.margin_without, []),
    ):
        others = [edge for edge in every if edge not in keeping]
        cut = tt.CutEdges(others, to=tt.Mean(prompts))
        np.testing.assert_allclose(margin, tt.predict(model, prompts, cut).margin, atol=1e-5)
    with pytest.raises(tt.errors.InputError, match="cannot be compared"):
        tt.faithfulness(model, prompts, {"circuit": circuit, "heads": model.heads[:2]})
    with pytest.raises(tt.errors.InputError, match="is no edge"):
        tt.faithfulness(model, prompts, {"upside down": [("2.0", "0.1", "q")]})
    with pytest.raises(tt.errors.InputError, match=r"the result of circuit\(\)"):
        tt.faithfulness(model, prompts, {"predictions": tt.predict(model, prompts)})


def test_graph_and_files(found: tuple[tt.Model, tt.Prompts, xr.Dataset], tmp_path: Path) -> None:
    circuit = found[2]
    graph = tt.figures.circuit_graph(circuit)
    assert graph.number_of_edges() == circuit.sizes["edge"]
    assert graph.nodes["answer @ last"]["layer"] == max(d["layer"] for _, d in graph.nodes.data())
    again = nx.read_graphml(tt.figures.save_circuit(circuit, tmp_path / "circuit.graphml"))
    assert set(again.nodes) == set(graph.nodes)
    text = tt.figures.save_circuit(circuit, tmp_path / "circuit.json").read_text()
    assert len(json.loads(text)["elements"]["edges"]) == circuit.sizes["edge"]
    axes = tt.figures.circuit(circuit)
    shown = {text.get_text() for text in axes.texts}
    assert {str(name) for name in circuit.source_name.values} <= shown
    saved = tt.open(tt.save(circuit, tmp_path / "circuit.zarr"))
    assert saved["circuit"].sizes["edge"] == circuit.sizes["edge"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"writers": 0}, "writers"),
        ({"threshold": 2.0}, "from 0 to 1"),
        ({"depth": -1}, "depth"),
        ({"before_last": 1}, "before_last"),
        ({"threshold": 1.0, "writers": 1}, "no head writes the answer"),
    ],
)
def test_bad_input(
    found: tuple[tt.Model, tt.Prompts, xr.Dataset], arguments: dict[str, Any], message: str
) -> None:
    model, prompts, _ = found
    with pytest.raises(tt.errors.InputError, match=message):
        tt.circuit(model, prompts, **arguments)


def test_prompts_that_are_not_answered() -> None:
    model = tiny("llama-grouped")
    prompts = tt.build_prompts(model, TWO, shots=1, n=24, seed=0)
    wrong = prompts[np.flatnonzero(tt.predict(model, prompts).margin.values < 0)]
    with pytest.raises(tt.errors.InputError, match="does not answer"):
        tt.circuit(model, wrong)
    with pytest.raises(tt.errors.InputError, match="no rankings"):
        tt.faithfulness(model, prompts, {})
    with pytest.raises(tt.errors.InputError, match="not the result of circuit"):
        tt.figures.save_circuit(tt.predict(model, prompts), "circuit.json")
