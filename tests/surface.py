"""Every measure and edit of the surface by name, for tests that go through all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import xarray as xr
from reference import error

import twotower as tt

Call = Callable[[tt.Model, tt.Prompts], Any]

OF_MEASURES = (
    tt.measures.circuit.circuit_heads,
    tt.measures.function_vector.vector_effects,
    tt.measures.residual.residual_streams,
    tt.measures.shares.attention_shares,
)
"""Public functions that fewer users need; they are in submodules."""

TARGETS = [(1, 2), (2, 0)]
GROUPS = [[(0, 1), (1, 2)], [(0, 1), (2, 0)]]

MEASURES: dict[str, Call] = {
    "predict": tt.predict,
    "last": lambda m, p: tt.head_effects(m, p),
    "labels": lambda m, p: tt.head_effects(m, p, "labels"),
    "all": lambda m, p: tt.head_effects(m, p, "all"),
    "groups": lambda m, p: tt.group_effects(m, p, GROUPS),
    "pairs": lambda m, p: tt.pair_effects(m, p),
    "greedy": lambda m, p: tt.greedy_heads(m, p, 2),
    "mean": lambda m, p: tt.head_effects(m, p, to=tt.Mean(p)),
    "resample": lambda m, p: tt.head_effects(m, p, to=tt.Resample(p)),
    "patch": lambda m, p: tt.head_effects(m, p, "labels", to=tt.From(p.reversed_labels())),
    "tracing": lambda m, p: tt.causal_tracing(m, p, p.reversed_labels()),
    "gradient": lambda m, p: tt.attribution_patching(m, p, "all"),
    "attribution": lambda m, p: tt.attribution(m, p, "own"),
    "frozen": lambda m, p: tt.attribution(m, p, "frozen"),
    "qk": tt.qk_similarity,
    "ov": lambda m, p: tt.ov_labels(m, p, top_tokens=[(0, 1), (2, 3)], keep="labels"),
    "shares": lambda m, p: tt.measures.shares.attention_shares(m, p, "labels"),
    "residuals": tt.measures.residual.residual_streams,
    "edges": lambda m, p: tt.edge_effects(m, p, None, TARGETS, positions="labels"),
    "towers": lambda m, p: tt.towers_of(m, p, TARGETS),
    "score parts": lambda m, p: tt.score_parts(m, p, TARGETS),
    "margin parts": lambda m, p: tt.margin_parts(m, p, TARGETS),
    "analyze": tt.analyze,
    "edits": lambda m, p: tt.predict(m, p, edits(m, p)),
}

REPEATED = ("predict", "last", "pairs", "greedy", "resample", "attribution", "qk")
"""Parts of `analyze`, and what takes the path of "groups" and "mean": where models are on a server,
on a disk or on several devices, `make test` leaves them out."""

FEW = ("labels", "attribution", "analyze", "edits")
"""A selection that runs most of the code; `make test` uses it where everything takes too long."""


def edits(model: tt.Model, prompts: tt.Prompts) -> list[Any]:
    """One edit of every kind, in heads of different layers; needs 3 layers of 4 heads."""
    twin, foo = prompts.reversed_labels(), tt.at(role="label", label="foo")
    found = [
        tt.KnockOut([(0, 0)], positions="all"),
        tt.KnockOut([(1, 3)], positions="all", to=tt.Mean(twin)),
        tt.KnockOut([(2, 2)], "last", to=tt.Resample(twin)),
        tt.KnockOut([(0, 1), (2, 3)], "all", to=tt.Times(2.0)),
        tt.ScaleAttention([(0, 2), (1, 1)], 2.0, foo, renormalize=True),
        tt.DropPosition([(1, 0)], positions="all"),
        tt.Patch([(1, 2)], twin, "attention"),
        tt.Patch([(1, 2), (2, 1)], twin, "values"),
        tt.KnockOut([(2, 0)], "last", to=tt.From(twin)),
        tt.CutEdges(
            [("0.1", (2, 3), "q"), ("embedding", (2, 3), "v"), ("1.0", "answer", "answer")]
        ),
    ]
    if model.architecture.learned_positions_path is None:
        found.append(tt.DropPosition([(0, 3)], foo, "all", distance="mean"))
    return found


def same(found: Any, expected: Any, tolerance: float) -> None:
    """Whether two results agree: numbers within a tolerance, all else exactly."""
    for a, b in zip(parts(found), parts(expected), strict=True):
        assert set(a.data_vars) == set(b.data_vars)
        for name, values in b.data_vars.items():
            if values.dtype.kind == "f":
                one, other = a[name].values, values.values
                np.testing.assert_array_equal(np.isnan(one), np.isnan(other))
                if not np.nan_to_num(other).any():
                    np.testing.assert_array_equal(one, other)
                    continue
                found = error(np.nan_to_num(one), np.nan_to_num(other))
                assert found <= tolerance, (name, found, float(np.nanmax(abs(other))))
            else:
                np.testing.assert_array_equal(a[name], values)


def parts(result: Any) -> Sequence[xr.Dataset]:
    """A dataset by itself, or those of a tree."""
    if isinstance(result, xr.DataTree):
        return [node.to_dataset(inherit=False) for node in result.subtree]
    return [result]


def under(measure, *arguments, **options):
    """A measure's result, with batch_size, memory_budget and progress set as options."""
    names = ("batch_size", "memory_budget", "progress")
    chosen = {name: options.pop(name) for name in names if name in options}
    with tt.set_options(**chosen):
        return measure(*arguments, **options)
