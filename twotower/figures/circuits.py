"""Circuits as figures, and as graphs for other programs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..checks import writable_file
from ..edits.cut import ANSWER
from ..edits.sources import parse_source
from ..errors import InputError
from ..head import parse_head
from .style import BLUE, GREEN, GREY, ORANGE, drawn
from .texts import printable

if TYPE_CHECKING:
    import networkx
    import xarray as xr
    from matplotlib.axes import Axes

TOWERS = {"q": BLUE, "k": ORANGE, "v": GREEN, ANSWER: GREY}
"""Colours of edges, by the tower into which they lead."""

STAGGER = 0.8
"""How far nodes of neighbouring layers stand apart sideways."""


def circuit_graph(found: xr.Dataset) -> networkx.MultiDiGraph:
    """Return a circuit as a graph of networkx.

    Parameters
    ----------
    found
        Result of `twotower.circuit`.

    Returns
    -------
    networkx.MultiDiGraph
        Nodes are named like "18.6 @ last", with the attributes name, at and layer (-1 for the
        embedding, one above the highest for the answer). Edges have tower, effect, low and high.

    Raises
    ------
    InputError
        If the dataset is not a circuit.
    """
    import networkx as nx

    if found.attrs.get("twotower_group") != "circuit":
        raise InputError("this is not the result of circuit")
    graph = nx.MultiDiGraph()
    names = ("source_name", "source_at", "target_name", "target_at", "tower")
    numbers = ("mean_effect", "low", "high")
    for edge in range(found.sizes["edge"]):
        one = found.isel(edge=edge)
        source, source_at, target, target_at, tower = (str(one[name].item()) for name in names)
        effect, low, high = (float(one[name]) for name in numbers)
        for name, at in ((source, source_at), (target, target_at)):
            graph.add_node(f"{name} @ {at}", name=name, at=at, layer=_layer(name))
        ends = (f"{source} @ {source_at}", f"{target} @ {target_at}")
        graph.add_edge(*ends, tower=tower, effect=effect, low=low, high=high)
    known = [data["layer"] for _, data in graph.nodes(data=True) if data["layer"] is not None]
    for _, data in graph.nodes(data=True):
        if data["layer"] is None:
            data["layer"] = max(known) + 1
    return graph


def _layer(name: str) -> int | None:
    """Return a node's layer: -1 for the embedding, None for the answer."""
    return None if name == ANSWER else parse_source(name).layer


def save_circuit(found: xr.Dataset, path: str | Path) -> Path:
    """Write a circuit for other programs, and return the path.

    Parameters
    ----------
    found
        Result of `twotower.circuit`.
    path
        A file named .graphml (yEd, Gephi, Cytoscape) or .json (Cytoscape's elements).

    Returns
    -------
    pathlib.Path

    Raises
    ------
    InputError
        If the dataset is not a circuit, the file has another ending, or it cannot be written.
    """
    import networkx as nx

    path = writable_file(path)
    graph = circuit_graph(found)
    if path.suffix == ".graphml":
        nx.write_graphml(graph, path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(nx.cytoscape_data(graph), indent=1) + "\n")
    else:
        raise InputError(f"{str(path)!r} must end with .graphml or .json")
    return path


@drawn(6.4, 5.2)
def circuit(found: xr.Dataset, *, ax: Axes) -> None:
    """Draw a circuit: layers upwards, a column for each place at which heads act.

    Parameters
    ----------
    found
        Result of `twotower.circuit`.
    ax
        Axes to draw on; by default of a new figure. The width of an edge is its effect; dashed
        edges work against the answer.

    Returns
    -------
    matplotlib.axes.Axes

    Raises
    ------
    InputError
        If the dataset is not a circuit.
    """
    graph = circuit_graph(found)
    places = _places(graph)
    largest = max(abs(data["effect"]) for *_, data in graph.edges(data=True))
    used = []
    for source, target, data in graph.edges(data=True):
        tower, effect = data["tower"], data["effect"]
        used.append(tower)
        bent = {"q": 0.08, "k": -0.08, "v": 0.16}.get(tower, 0.0)
        style: dict[str, Any] = {
            "arrowstyle": "-|>",
            "connectionstyle": f"arc3,rad={bent}",
            "color": TOWERS[tower],
            "lw": 0.4 + 3 * abs(effect) / largest,
            "ls": "-" if effect > 0 else "--",
            "alpha": 0.75,
            "shrinkA": 9,
            "shrinkB": 9,
        }
        ax.annotate("", places[target], places[source], arrowprops=style)
    for node, data in graph.nodes(data=True):
        box = {"boxstyle": "round,pad=0.25", "fc": "white", "ec": GREY, "lw": 0.8}
        ax.text(*places[node], printable(data["name"]), ha="center", va="center", size=7, bbox=box)
    for tower in TOWERS:
        if tower in used:
            words = "into the answer" if tower == ANSWER else f"into {tower}"
            ax.plot([], [], color=TOWERS[tower], label=words)
    ax.plot([], [], color=GREY, ls="--", label="against the answer")
    axes = _axes(graph, places)
    ax.set_xticks([x for x, _ in axes["columns"]], [printable(at) for _, at in axes["columns"]])
    ax.set_yticks([y for y, _ in axes["layers"]], [words for _, words in axes["layers"]])
    ax.set_ylabel("layer")
    xs, ys = zip(*places.values(), strict=True)
    ax.set_xlim(min(xs) - 0.8, max(xs) + 0.8)
    ax.set_ylim(min(ys) - 0.8, max(ys) + 0.8)
    ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=5)


def circuit_data(found: xr.Dataset) -> dict[str, Any]:
    """Return a circuit as drawn, for the report: nodes with places, edges and axes.

    Parameters
    ----------
    found
        Result of `twotower.circuit`.
    """
    graph = circuit_graph(found)
    places = _places(graph)
    numbers = {node: i for i, node in enumerate(graph.nodes)}
    nodes = []
    for node, data in graph.nodes(data=True):
        source = None if data["name"] == ANSWER else parse_source(data["name"])
        head = None
        if source is not None and source.kind == "head":
            head = list(parse_head(data["name"]))
        x, y = places[node]
        nodes.append({"name": data["name"], "at": data["at"], "head": head, "x": x, "y": y})
    edges = [
        {"source": numbers[source], "target": numbers[target], "tower": data["tower"]}
        | {name: float(f"{data[name]:.4g}") for name in ("effect", "low", "high")}
        for source, target, data in graph.edges(data=True)
    ]
    return {"nodes": nodes, "edges": edges, **_axes(graph, places)}


def _axes(
    graph: networkx.MultiDiGraph, places: dict[str, tuple[float, float]]
) -> dict[str, list[tuple[float, str]]]:
    """Return the ticks: columns at their middles, layers at their heights."""
    columns = sorted({data["at"] for _, data in graph.nodes(data=True)}, key=_column)
    across = [
        float(np.mean([places[n][0] for n, data in graph.nodes(data=True) if data["at"] == at]))
        for at in columns
    ]
    heights = {data["layer"]: places[node][1] for node, data in graph.nodes(data=True)}
    layers = sorted(heights)
    words = ["embedding" if layer < 0 else str(layer) for layer in layers[:-1]] + [ANSWER]
    return {
        "columns": [(x, f"at {at}") for x, at in zip(across, columns, strict=True)],
        "layers": [(heights[layer], word) for layer, word in zip(layers, words, strict=True)],
    }


def _column(at: str) -> tuple[bool, str]:
    return at == "last", at


def _places(graph: networkx.MultiDiGraph) -> dict[str, tuple[float, float]]:
    """Return the place (x, y) of every node; nodes of one layer and column stand side by side."""
    layers = sorted({data["layer"] for _, data in graph.nodes(data=True)})
    groups: dict[tuple[str, int], list[str]] = {}
    for node, data in sorted(graph.nodes(data=True)):
        groups.setdefault((data["at"], data["layer"]), []).append(node)
    columns = sorted({at for at, _ in groups}, key=_column)
    width = {
        at: max(len(nodes) for (own, _), nodes in groups.items() if own == at) for at in columns
    }
    places: dict[str, tuple[float, float]] = {}
    left = 0.0
    for at in columns:
        for (own, layer), nodes in groups.items():
            if own == at:
                rank = layers.index(layer)
                # Staggered, so that edges within a column do not run behind nodes.
                start = left + (width[at] - len(nodes)) / 2 + STAGGER * (rank % 3 - 1)
                for i, node in enumerate(nodes):
                    places[node] = (start + i, float(rank))
        left += width[at] + 2
    return places
