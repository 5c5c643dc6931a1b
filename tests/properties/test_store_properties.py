"""Whatever a dataset holds, it is the same after it was saved and opened; and schemas refuse."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from settings import examples

import twotower as tt
from twotower.figures.packing import rounded
from twotower.results import GROUPS, check_dataset, make_dataset
from twotower.results.schema import COORDINATES, Variable
from twotower.results.store import make_tree

NO_UNITS = [name for name in GROUPS if name != "units"]
# Zarr's texts are UTF-8, which has no surrogates; NumPy's texts cannot end in NUL.
TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=12)
ABOUT = {"model": "m", "settings": "{}", "labels": '["foo", "bar"]'}


def values(draw: Any, variable: Variable, shape: tuple[int, ...]) -> np.ndarray:
    size = int(np.prod(shape))
    if variable.kind == "str":
        found = draw(st.lists(TEXTS, min_size=size, max_size=size))
        return np.array(found, dtype=object).reshape(shape)
    if variable.kind == "bool":
        return draw(arrays.arrays(bool, shape))
    if variable.kind == "int":
        return draw(arrays.arrays(np.int64, shape, elements=st.integers(-1, 2**40)))
    dtype = draw(st.sampled_from([np.float32, np.float64]))
    return draw(arrays.arrays(dtype, shape))  # NaN and infinities too


@st.composite
def datasets(draw: Any, group: str) -> xr.Dataset:
    """A dataset of a group, of any shape, with or without what it need not have."""
    chosen = {
        name: variable
        for name, variable in GROUPS[group].items()
        if variable.required or draw(st.booleans())
    }
    dims = dict.fromkeys(dim for variable in chosen.values() for dim in variable.dims)
    sizes = {dim: draw(st.integers(1, 4)) for dim in dims}
    texts = {"label", "chosen", "source"}
    coordinates: dict[str, Any] = {
        dim: np.array([f"{dim} {i}" for i in range(n)], dtype=object)
        if dim in texts
        else np.arange(n) - (n - 1) * (dim == "position")
        for dim, n in sizes.items()
    }
    for name, variable in COORDINATES.items():
        if set(variable.dims) <= set(sizes) and name not in ("measured", "token_position"):
            coordinates[name] = values(draw, variable, tuple(sizes[d] for d in variable.dims))
    found = {
        name: values(draw, variable, tuple(sizes[dim] for dim in variable.dims))
        for name, variable in chosen.items()
    }
    return make_dataset(group, found, coordinates, ABOUT)


@st.composite
def runs(draw: Any) -> xr.DataTree:
    names = draw(st.lists(st.sampled_from(NO_UNITS), min_size=1, max_size=3, unique=True))
    return make_tree({name: draw(datasets(name)) for name in names}, ABOUT)


def same(before: xr.DataArray, after: xr.DataArray) -> None:
    assert before.dims == after.dims
    assert before.attrs == after.attrs
    if before.dtype.kind == "O":
        assert before.values.tolist() == after.values.tolist()
    else:
        assert before.dtype == after.dtype
        np.testing.assert_array_equal(before.values, after.values)


@examples(8)
@given(run=runs())
def test_saved_and_opened_it_is_the_same(run: xr.DataTree) -> None:
    with tempfile.TemporaryDirectory() as folder:
        opened = tt.open(tt.save(run, Path(folder) / "run.zarr"))
        assert set(opened.children) == set(run.children)
        assert opened.attrs == run.attrs
        for name, node in run.children.items():
            assert opened[name].attrs == node.attrs
            assert set(opened[name].data_vars) == set(node.data_vars)
            assert set(opened[name].coords) == set(node.coords)
            for variable in (*node.data_vars, *node.coords):
                same(node[variable], opened[name][variable])


@pytest.mark.parametrize("group", NO_UNITS)
def test_the_schema_holds_for_any_shape(group: str) -> None:
    @examples(5)
    @given(dataset=datasets(group), data=st.data())
    def check(dataset: xr.Dataset, data: Any) -> None:
        check_dataset(dataset, group)
        name = data.draw(st.sampled_from(sorted(map(str, dataset.data_vars))))
        variable = GROUPS[group][name]
        if variable.required:
            with pytest.raises(tt.errors.SchemaError, match="lacks the variable"):
                check_dataset(dataset.drop_vars(name), group)
        if len(variable.dims) > 1:
            turned = dataset.assign({name: dataset[name].transpose(*reversed(variable.dims))})
            with pytest.raises(tt.errors.SchemaError, match="has dims"):
                check_dataset(turned, group)
        with pytest.raises(tt.errors.SchemaError, match="has no variable"):
            check_dataset(dataset.assign(other=dataset[name]), group)
        bare = dataset.copy()
        bare[name] = dataset[name].drop_attrs()
        with pytest.raises(tt.errors.SchemaError, match="lacks the attribute"):
            check_dataset(bare, group)
        if variable.dims:
            dim = data.draw(st.sampled_from(variable.dims))
            with pytest.raises(tt.errors.SchemaError, match="no coordinate"):
                check_dataset(dataset.drop_vars(dim), group)

    check()


@examples(30)
@given(
    array=arrays.arrays(
        np.float32,
        arrays.array_shapes(max_dims=3),
        elements=st.floats(-3e4, 3e4, width=32) | st.just(np.nan),
    )
)
def test_a_page_holds_values_to_half_a_step(array: np.ndarray) -> None:
    step, whole = rounded(array)
    back = np.where(whole == -32768, np.nan, whole * step)
    np.testing.assert_array_equal(np.isnan(back), np.isnan(array))
    error = np.abs(back - array)
    assert np.isnan(array).all() or np.nanmax(error) <= 0.5001 * step + 1e-6


@examples(30)
@given(
    array=arrays.arrays(
        np.float64,
        st.tuples(st.integers(1, 6), st.integers(1, 3)),
        elements=st.floats(-100, 100, width=32) | st.just(np.nan),
    )
)
def test_means_and_intervals(array: np.ndarray) -> None:
    from scipy import stats

    dataset = xr.Dataset({"x": (("prompt", "y"), array)}, attrs={"twotower_group": "table"})
    found = dataset.tt.mean_ci("prompt").x.transpose("estimate", "y").values
    for column, (mean, low, high) in zip(array.T, found.T, strict=True):
        kept = column[np.isfinite(column)]
        if not len(kept):
            assert np.isnan([mean, low, high]).all()
            continue
        assert mean == pytest.approx(kept.mean(), abs=1e-9)
        if len(kept) == 1:
            assert np.isnan([low, high]).all()
            continue
        width = stats.t.ppf(0.975, len(kept) - 1) * stats.sem(kept)
        assert high - mean == pytest.approx(width, abs=1e-7)
        assert mean - low == pytest.approx(width, abs=1e-7)
