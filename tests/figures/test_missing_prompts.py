"""What is shown of a run leaves out prompts that are not finite, and says so."""

from __future__ import annotations

from io import StringIO
from pathlib import Path

import matplotlib as mpl
import not_finite as given
import numpy as np
import pytest
import xarray as xr
from matplotlib import pyplot as plt
from rich.console import Console

import twotower as tt
from twotower.figures import bias_curves, head_table, knocked_out, write_report
from twotower.figures.report_data import run_data, table_of
from twotower.figures.terminal import rows_of, show_heads
from twotower.figures.views import prompt_view, prompts_of

mpl.use("Agg")


@pytest.fixture(scope="module")
def bad() -> np.ndarray:
    return given.holds(given.prompts())


@pytest.fixture(scope="module")
def run() -> xr.DataTree:
    with given.unwarned():
        return tt.analyze(given.model(), given.prompts())


@pytest.fixture(scope="module")
def alone(bad: np.ndarray) -> xr.DataTree:
    return tt.analyze(given.model(), given.prompts()[np.flatnonzero(~bad)])


def test_tables(run: xr.DataTree, alone: xr.DataTree, bad: np.ndarray) -> None:
    xr.testing.assert_allclose(head_table(run), head_table(alone), atol=0.02)
    assert prompts_of(run) == np.flatnonzero(~bad).tolist()
    strongest = [(row["layer"], row["head"]) for row in rows_of(run, "margin_drop", 3)]
    assert strongest == [(row["layer"], row["head"]) for row in rows_of(alone, "margin_drop", 3)]
    out = StringIO()
    show_heads(rows_of(run, "ov_auc", 3), Console(file=out))
    assert "nan" not in out.getvalue()
    with pytest.raises(tt.errors.InputError, match=r"is missing: its logits are not finite"):
        prompt_view(run, int(np.flatnonzero(bad)[0]))
    assert prompt_view(run, int(np.flatnonzero(~bad)[0])).answer["correct"] in (True, False)


def test_curves(run: xr.DataTree, alone: xr.DataTree) -> None:
    pairs = []
    for one in (run, alone):
        found = one["predictions"].to_dataset(inherit=False)
        bias = tt.label_bias(found, ["foo"] * found.sizes["prompt"])
        ax, other = knocked_out({"a": {0: found, 1: found}}), bias_curves({"a": {1: bias}})
        layers = one.tt.figure.effect_by_layer()
        heights = [bar.get_height() for bar in layers.patches]
        pairs.append([*ax.lines[0].get_ydata(), *other.lines[0].get_ydata(), *heights])
        one.tt.figure.head_map()
        one.tt.figure.two_towers()
    np.testing.assert_allclose(*pairs, atol=0.05)
    assert np.isfinite(pairs).all()
    plt.close("all")


def test_report(run: xr.DataTree, alone: xr.DataTree, bad: np.ndarray, tmp_path: Path) -> None:
    found, expected = (run_data(one, "A", table_of(one)) for one in (run, alone))
    assert found["numbers"] == expected["numbers"]
    notes = " ".join(found["notes"])
    assert f"{bad.sum()} of {len(bad)} prompts" in notes
    assert "so far" not in notes
    assert write_report(run, tmp_path / "run.html").exists()
