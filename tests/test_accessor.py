"""The accessor: every method against plain xarray, its examples, and laziness on stored runs."""

from __future__ import annotations

import doctest
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import xarray as xr
from scipy import stats

import twotower as tt
from twotower import accessor


@pytest.fixture(scope="module")
def run(llama: tt.Model, prompts: tt.Prompts) -> xr.DataTree:
    return tt.analyze(llama, prompts)


@pytest.fixture(scope="module")
def stored(run: xr.DataTree, tmp_path_factory: pytest.TempPathFactory) -> xr.DataTree:
    return tt.open(tt.save(run, tmp_path_factory.mktemp("runs") / "run.zarr"))


def test_examples(llama: tt.Model, prompts: tt.Prompts) -> None:
    found = doctest.testmod(accessor, globs={"tt": tt, "model": llama, "prompts": prompts})
    assert found.attempted >= 10
    assert found.failed == 0


@pytest.mark.parametrize("first", ["twotower", "xarray", "twotower.accessor"])
def test_it_is_there_whatever_is_imported_first(first: str) -> None:
    second = "twotower" if first == "xarray" else "xarray"
    code = f"import {first}, {second}; xarray.Dataset.tt; xarray.DataTree.tt"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_importing_the_package_does_not_import_xarray() -> None:
    code = "import sys, twotower; sys.exit('xarray' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_heads(run: xr.DataTree) -> None:
    assert run.tt.heads(5) == tt.in_context_heads(run, 5)
    assert run.tt.heads(5, by="label_logit") == tt.in_context_heads(run, 5, by="label_logit")
    auc = run["scores"]["qk_auc"]
    best = run.tt.heads(3, by="qk_auc")
    values = [float(auc.sel(layer=head.layer, head=head.head)) for head in best]
    assert values == sorted(auc.values.ravel(), reverse=True)[:3]
    with pytest.raises(tt.errors.InputError, match="use one of .*ov_auc"):
        run.tt.heads(3, by="beauty")
    assert run.effects.to_dataset().tt.heads(3, label="foo") == tt.in_context_heads(
        run.effects.to_dataset(), 3, label="foo"
    )


def test_one_head(run: xr.DataTree) -> None:
    one = run.tt.head(2, 1)
    assert set(one.children) == set(run.children)
    for name in ("effects", "qk", "ov", "scores"):
        assert not {"layer", "head"} & set(one[name].dims)
        for variable, array in one[name].data_vars.items():
            xr.testing.assert_identical(array, run[name][variable].sel(layer=2, head=1))
    assert one.attrs == run.attrs
    assert one.qk.attention.attrs == run.qk.attention.attrs


@pytest.mark.parametrize("roles", [("label",), ("label", "query"), ("last",)])
def test_roles(run: xr.DataTree, roles: tuple[str, ...]) -> None:
    found = run.tt.roles(*roles)
    for name, variable in (("qk", "attention"), ("qk", "score"), ("ov", "label_logit")):
        before = run[name][variable]
        after = found[name][variable]
        assert after.dims == before.dims
        kept = np.isin(before.role.values, roles)
        columns = [int(p) for p in before.position.values[kept.any(axis=0)]]
        assert after.position.values.tolist() == columns
        expected = before.values.copy()
        expected[np.broadcast_to(~np.expand_dims(kept, (1, 2)), expected.shape[:4])] = np.nan
        np.testing.assert_array_equal(after.values, expected[:, :, :, kept.any(axis=0)])
    token = found["prompts"]["token"]
    assert set(token.values[~np.isin(token.role.values, roles)].tolist()) <= {""}
    assert found["prompts"]["token_id"].dtype.kind == "i"
    assert (found["prompts"]["token_id"].values[~np.isin(token.role.values, roles)] == -1).all()
    assert found["effects"].identical(run["effects"])


def test_weighted(run: xr.DataTree) -> None:
    found = run.tt.weighted()
    expected = run.qk.attention.values[..., None] * run.ov.label_logit.values
    np.testing.assert_array_equal(found.values, expected)
    assert found.dims == run.ov.label_logit.dims
    assert found.attrs["units"] == "1"
    assert found.attrs["reference"]


def test_logit_minus(run: xr.DataTree) -> None:
    found = run.tt.logit_minus("bar", "foo")
    for name, variable in (
        ("predictions", "logit"),
        ("ov", "label_logit"),
        ("attribution", "logprob_increase"),
    ):
        values = run[name][variable]
        expected = values.sel(label="bar").values - values.sel(label="foo").values
        np.testing.assert_array_equal(found[name][variable].values, expected)
        assert "bar less foo" in found[name][variable].attrs["long_name"]
    assert "margin" not in found["predictions"]


def test_mean_and_interval(run: xr.DataTree) -> None:
    found = run.tt.mean_ci("prompt", level=0.9).effects.margin_drop
    values = run.effects.margin_drop.values
    n = len(values)
    low, high = stats.t.interval(
        0.9, n - 1, values.mean(axis=0), values.std(axis=0, ddof=1) / np.sqrt(n)
    )
    for name, expected in (("mean", values.mean(axis=0)), ("low", low), ("high", high)):
        np.testing.assert_allclose(found.sel(estimate=name).values, expected, rtol=1e-5, atol=1e-7)
    assert found.attrs == run.effects.margin_drop.attrs


def test_mean_and_interval_leave_missing_values_out(run: xr.DataTree) -> None:
    found = run.qk.to_dataset().tt.mean_ci("prompt").attention
    values = run.qk.attention.values
    first = values[:, 0, 0, 0]  # the first position is padding in all prompts but the longest
    assert np.isfinite(first).sum() == 1
    assert found.sel(estimate="mean").values[0, 0, 0] == pytest.approx(np.nanmean(first))
    assert np.isnan(found.sel(estimate="low").values[0, 0, 0])
    last = values[:, 0, 0, -1].astype(float)
    low = last.mean() - stats.t.ppf(0.975, len(last) - 1) * stats.sem(last)
    assert found.sel(estimate="low").values[0, 0, -1] == pytest.approx(low, rel=1e-5)


def test_frames(run: xr.DataTree) -> None:
    heads = run.tt.to_frame()
    assert len(heads) == 12
    row = heads[(heads["layer"] == 2) & (heads["head"] == 1)].iloc[0]
    assert row["qk_auc"] == run.scores.qk_auc.values[2, 1]
    assert row["margin_drop"] == pytest.approx(float(run.effects.margin_drop.mean("prompt")[2, 1]))
    frame = run.qk.tt.to_frame()
    pd.testing.assert_frame_equal(frame, run.qk.to_dataset().tt.to_frame())
    assert len(frame) == 12 * int((run.qk.role != "pad").sum())
    label = frame[frame["role"] == "label"].iloc[0]
    at = {name: label[name] for name in ("prompt", "layer", "head", "position")}
    assert label["attention"] == run.qk.attention.sel(at).item()


def test_frames_have_each_number_once(run: xr.DataTree) -> None:
    """Tokens are coordinates of effects, and prompts have different numbers of them."""
    effects = run.effects.to_dataset()
    assert len(set((effects["role"] != "pad").sum("position").values)) > 1
    frame = effects.tt.to_frame()
    assert len(frame) == effects["logprob_drop"].size
    means = frame.groupby(["layer", "head"])["margin_drop"].mean().to_numpy()
    np.testing.assert_allclose(
        means, effects["margin_drop"].mean("prompt").values.ravel(), rtol=1e-5
    )


def test_stored_runs_stay_lazy(stored: xr.DataTree, run: xr.DataTree) -> None:
    answers = {
        "head": stored.tt.head(1, 2).qk.attention,
        "roles": stored.tt.roles("label").ov.label_logit,
        "weighted": stored.tt.weighted(),
        "minus": stored.tt.logit_minus("foo", "bar").ov.label_logit,
        "mean": stored.tt.mean_ci("prompt").qk.score.sel(estimate="high"),
    }
    expected = {
        "head": run.tt.head(1, 2).qk.attention,
        "roles": run.tt.roles("label").ov.label_logit,
        "weighted": run.tt.weighted(),
        "minus": run.tt.logit_minus("foo", "bar").ov.label_logit,
        "mean": run.tt.mean_ci("prompt").qk.score.sel(estimate="high"),
    }
    for name, lazy in answers.items():
        assert lazy.chunks is not None, name
        np.testing.assert_allclose(lazy.values, expected[name].values, rtol=1e-6, err_msg=name)


def test_wrong_questions(run: xr.DataTree, tmp_path: Path) -> None:
    for ask, words in (
        (lambda: run.tt.head(3, 0), "no layer 3"),
        (lambda: run.tt.head(0, 4), "no head 4"),
        (lambda: run.tt.head("1", 0), "whole number"),
        (lambda: run.tt.head(0.5, 0), "whole number"),
        (lambda: run.tt.roles("labels"), "no position has the role 'labels'"),
        (lambda: run.tt.roles(), "give one or more of the roles"),
        (lambda: run.tt.logit_minus("foo", "baz"), "label 'baz' is not among foo, bar"),
        (lambda: run.tt.mean_ci("prompts"), "no dim 'prompts'"),
        (lambda: run.tt.mean_ci("prompt", level=95), "between 0 and 1"),
        (lambda: run.tt.heads(0), "k=0"),
        (lambda: run.scores.to_dataset().tt.roles("label"), "no dim 'position'"),
        (lambda: run.effects.to_dataset().tt.head(9, 9), "no layer 9"),
        (lambda: xr.DataTree().tt.to_frame(), "is not a run"),
        (lambda: xr.DataTree().tt.weighted(), "is not a run"),
    ):
        with pytest.raises(tt.errors.InputError, match=words):
            ask()
    part = run.copy()
    del part["ov"]
    with pytest.raises(tt.errors.InputError, match="needs the group 'ov'"):
        part.tt.weighted()


def test_weighted_needs_the_same_positions(llama: tt.Model, prompts: tt.Prompts) -> None:
    run = tt.analyze(llama, prompts, keep="labels")
    found = run.tt.weighted()
    expected = run.qk.attention.values[..., None] * run.ov.label_logit.values
    np.testing.assert_array_equal(found.values, expected)
    run["ov"] = tt.ov_labels(llama, prompts)
    with pytest.raises(tt.errors.InputError, match="qk and ov differ in position"):
        run.tt.weighted()
    run["ov"] = tt.ov_labels(llama, prompts[[1, 0, 3, 2, 5, 4]], keep="labels")
    with pytest.raises(tt.errors.InputError, match="qk and ov were measured on different prompts"):
        run.tt.weighted()
