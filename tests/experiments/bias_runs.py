"""What the tests of both experiments on biases need: a tiny setting, and made-up tables."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import product
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import xarray as xr
from tiny import tiny

import twotower as tt
from twotower.experiments.experiment import Setting, Size

KINDS = ("heads that write", "in-context heads")
SMALL = Size("small", (0,), n_fit=12, n_test=8, shots=4, k=2, n_random=2, n_task=4)

_LETTERS = [a + b for a, b in product("bcdfghjk", "aeiou")]
SHORT = tt.Task(
    "short-tiny",
    {"low": _LETTERS[:40], "high": [text.upper() for text in _LETTERS[:40]]},
)
"""Texts enough for fourteen demonstrations in either half, each of a few tokens."""


def small_setting(folder: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> Setting:
    """A setting with a random model, which need not be able to do the task."""
    monkeypatch.setattr("twotower.experiments.experiment.check_task", lambda run, name: None)
    return Setting(tiny(name), SHORT, 0, SMALL, folder)


def one_of_each_kind(module: ModuleType, setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave one edit of each kind of heads to be chosen, to be quick."""
    found = {one.kind: (name, one) for name, one in module.candidates(setting).items()}
    few = dict(found.values())
    monkeypatch.setitem(module.measure.__globals__, "candidates", lambda setting: few)


def mitigation(
    bias: Mapping[str, float], seed: int, n: int = 40, spread: float = 0.3
) -> dict[str, xr.Dataset]:
    """Tables of a run in which each edit leaves a given bias, in logits and in counts."""
    rng = np.random.default_rng(seed)
    noise = rng.normal(0, spread, (n, 2, 1))
    means = np.array(list(bias.values()))
    dims = ("prompt", "favoured", "edit")
    coordinates = {"favoured": ["foo", "bar"], "edit": list(bias)}
    table = xr.Dataset(
        {
            "logit_bias": (dims, means + noise),
            "count_bias": (dims, (means + noise) / 4),
            "correct": (dims, np.ones((n, 2, len(means)), dtype=bool)),
            "top1_correct": (dims, np.ones((n, 2, len(means)), dtype=bool)),
        },
        coordinates,
    )
    choice = xr.Dataset(
        {"edit_name": ("kind", ["one", "two"]), "left": ("kind", [0.4, 0.8])}, {"kind": list(KINDS)}
    )
    return {"mitigation": table, "choice": choice}
