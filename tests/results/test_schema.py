"""The schema refuses what does not have its form, and says where."""

from __future__ import annotations

import json

import numpy as np
import pytest
import xarray as xr

import twotower as tt
from twotower.results import GROUPS, check_dataset


@pytest.fixture(scope="module")
def run(llama: tt.Model, prompts: tt.Prompts) -> xr.DataTree:
    return tt.analyze(llama, prompts)


def test_every_group_describes_every_variable(run: xr.DataTree) -> None:
    for name, node in run.children.items():
        dataset = node.to_dataset(inherit=False)
        check_dataset(dataset, name)
        for variable in dataset.data_vars.values():
            assert variable.attrs["units"]
            assert variable.attrs["long_name"]
            assert variable.attrs["reference"]
        for dim in dataset.dims:
            assert dim in dataset.indexes


def test_measured_variables_are_those_of_the_schema(run: xr.DataTree) -> None:
    for name in ("prompts", "predictions", "effects", "attribution", "qk"):
        assert set(run[name].data_vars) == set(GROUPS[name])


def test_coordinates(run: xr.DataTree, prompts: tt.Prompts, llama: tt.Model) -> None:
    qk = run["qk"]
    assert qk["position"].values.tolist() == list(range(1 - prompts.n_positions, 1))
    assert qk["layer"].values.tolist() == list(range(llama.n_layers))
    assert run["ov"]["label"].values.tolist() == ["foo", "bar"]
    assert (qk["role"].values == prompts.role).all()
    assert (qk["role"].sel(position=0) == "last").all()


def test_selecting_by_role_class_and_label(run: xr.DataTree, prompts: tt.Prompts) -> None:
    attention = run.qk.attention.sel(layer=1, head=2)
    chosen = attention.where((attention.role == "label") & (attention.label_text == "foo"))
    assert int(chosen.notnull().sum()) == 3 * len(prompts)
    by_hand = [
        run["qk"]["attention"]
        .values[i, 1, 2][(prompts.role[i] == "label") & (prompts.label_text[i] == "foo")]
        .sum()
        for i in range(len(prompts))
    ]
    np.testing.assert_allclose(chosen.sum("position").values, by_hand, rtol=1e-6)


def test_provenance(run: xr.DataTree, prompts: tt.Prompts) -> None:
    for node in run.children.values():
        about = node.attrs
        assert about["prompts_hash"] == prompts.hash
        assert about["dtype"] == "float32"
        assert json.loads(about["versions"])["nnsight"]
        assert json.loads(about["labels"]) == ["foo", "bar"]
        assert about["attention_kernel"] == "eager"
    assert json.loads(run["effects"].attrs["settings"])["to"] == "zero"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.drop_vars("margin_drop"), "lacks the variable 'margin_drop'"),
        (lambda d: d.assign(other=d.margin_drop), "no variable 'other'"),
        (lambda d: d.transpose("head", "layer", ...), "has dims"),
        (lambda d: d.drop_vars("layer"), "no coordinate for its dim 'layer'"),
        (lambda d: d.drop_vars("gold"), "lacks the coordinate 'gold'"),
        (lambda d: d.drop_vars("role"), "lacks the coordinate 'role'"),
        (lambda d: d.assign(margin_drop=d.margin_drop.astype(str)), "has dtype"),
        (lambda d: d.assign_attrs(twotower_schema=99), "schema 99"),
        (lambda d: d.assign_attrs(twotower_group="nonsense"), "is not a group"),
        (lambda d: d.assign(margin_drop=d.margin_drop.drop_attrs()), "lacks the attribute"),
        (lambda d: d.expand_dims("seed"), "has dims"),
    ],
)
def test_refuses_other_forms(run: xr.DataTree, change, message: str) -> None:
    dataset = run["effects"].to_dataset(inherit=False)
    check_dataset(dataset)
    with pytest.raises(tt.errors.SchemaError, match=message):
        check_dataset(change(dataset))
