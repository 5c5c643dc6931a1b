"""Make datasets of the schema, and check them when they are made, saved or opened."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ..errors import InputError, SchemaError
from .schema import COORDINATES, DIMS, GROUPS, SCHEMA_VERSION, TABLE, Variable

if TYPE_CHECKING:
    import numpy as np
    import xarray as xr

MISSING = ("measured", "finite")
"""Coordinates that mark prompts with values; with them, boolean variables are floats."""

OPTIONAL = ("token_position", *MISSING, "answer_text", "answer_token", "answer_tokens")
"""Coordinates that any dataset may lack."""

_KINDS = {"float": "f", "int": "iu", "bool": "b", "str": "OUT"}


def make_dataset(
    group: str,
    values: Mapping[str, np.ndarray],
    coordinates: Mapping[str, Any],
    attributes: Mapping[str, Any],
) -> xr.Dataset:
    """Make and check a dataset of a group; names, units and definitions come from the schema.

    Parameters
    ----------
    group
        One of `GROUPS`.
    values
        Arrays by variable, with the schema's dims.
    coordinates
        Index coordinates by dim, and arrays of `COORDINATES` by name.
    attributes
        Attributes of the dataset, such as provenance.
    """
    import xarray as xr

    variables = {
        name: (GROUPS[group][name].dims, array, describe(GROUPS[group][name]))
        for name, array in values.items()
    }
    coords: dict[str, Any] = {}
    for name, array in coordinates.items():
        known = COORDINATES.get(name)
        form = (name,) if known is None else (known.dims, describe(known))
        coords[name] = (form[0], _texts(array), *form[1:])
    about = {"twotower_schema": SCHEMA_VERSION, "twotower_group": group, **attributes}
    dataset = xr.Dataset(variables, coords, about)
    check_dataset(dataset, group)
    return dataset


def _texts(values: Any) -> np.ndarray:
    """Return an array, texts as objects: Zarr v3 has no standard for fixed-length texts."""
    import numpy as np

    array = np.asarray(values)
    return array.astype(object) if array.dtype.kind == "U" else array


def measured_prompts(dataset: xr.Dataset | xr.DataTree) -> xr.Dataset:
    """Return a dataset, or a group of a run, without prompts whose values are missing.

    A prompt is missing if it is not measured yet, or if its logits are not finite.
    """
    dataset = _as_dataset(dataset)
    known = [name for name in MISSING if _by_prompt(dataset, name)]
    for name in known:
        dataset = dataset.isel(prompt=dataset[name].values.astype(bool))
    return with_booleans(dataset.drop_vars(known)) if known else dataset


def _as_dataset(group: xr.Dataset | xr.DataTree) -> xr.Dataset:
    import xarray as xr

    return group.to_dataset(inherit=False) if isinstance(group, xr.DataTree) else group


def with_dims(dataset: xr.Dataset | xr.DataTree, name: str, *needed: str) -> xr.Dataset:
    """Return a group that has some dims and no unknown ones, with dims in the schema's order.

    Parameters
    ----------
    dataset
        A measure's result, in which dims may have been selected or averaged away since.
    name
        Its name in messages.
    *needed
        Dims and coordinates that it must have.

    Raises
    ------
    InputError
        If it lacks one of them, or has a dim that no group has.
    """
    dataset = _as_dataset(dataset).copy()
    for one in needed:
        if one in DIMS and one not in dataset.dims:
            raise InputError(f"{name} has no dim {one!r}; use a run with all its dims")
        if one not in DIMS and one not in dataset.coords:
            raise InputError(f"{name} lacks the coordinate {one!r}, which measures give")
    for own in dataset.dims:
        if own not in DIMS:
            raise InputError(f"{name} has a dim {own!r} that no measure gives; select from it")
    known = {**COORDINATES, **GROUPS.get(dataset.attrs.get("twotower_group", name), {})}
    for variable, array in list(dataset.variables.items()):
        order = known[str(variable)].dims if variable in known else ()
        if array.dims != order and {*array.dims} == {*order}:
            dataset[variable] = dataset[variable].transpose(*order)
    return dataset


def _by_prompt(dataset: xr.Dataset, name: str) -> bool:
    return name in dataset.coords and dataset[name].dims == ("prompt",)


def with_booleans(dataset: xr.Dataset) -> xr.Dataset:
    """Convert boolean variables that are stored as floats back to booleans.

    Missing values become False, so remove missing prompts first.
    """
    about = GROUPS.get(dataset.attrs.get("twotower_group", ""), {})
    for name, array in dataset.data_vars.items():
        if name in about and about[str(name)].kind == "bool" and array.dtype.kind == "f":
            dataset = dataset.assign({name: array.fillna(0).astype(bool).assign_attrs(array.attrs)})
    return dataset


def make_table(
    variables: Mapping[str, tuple[Variable, Any]],
    coordinates: Mapping[str, Any],
    attributes: Mapping[str, Any],
) -> xr.Dataset:
    """Make a dataset of an experiment's own variables, described like those of `GROUPS`.

    Parameters
    ----------
    variables
        Description and array, by name.
    coordinates
        Index coordinates by dim.
    attributes
        Attributes of the dataset, such as provenance.
    """
    import xarray as xr

    found = {
        name: (about.dims, array, describe(about)) for name, (about, array) in variables.items()
    }
    coords = {dim: _texts(values) for dim, values in coordinates.items()}
    about = {"twotower_schema": SCHEMA_VERSION, "twotower_group": TABLE, **attributes}
    table = xr.Dataset(found, coords, about)
    check_dataset(table)
    return table


def describe(variable: Variable) -> dict[str, str]:
    """Return the attributes that describe a variable."""
    return {
        "long_name": variable.long_name,
        "units": variable.units,
        "reference": variable.reference,
    }


def check_dataset(dataset: xr.Dataset, group: str | None = None) -> None:
    """Check that a dataset matches the schema of its group.

    Parameters
    ----------
    dataset
        The dataset.
    group
        Name of the group. By default the dataset's attribute `twotower_group`, which also
        replaces names that are not groups (of several datasets of one group in a run).

    Raises
    ------
    SchemaError
        If it does not match. Names the variable, and the found and expected form.
    """
    own = dataset.attrs.get("twotower_group")
    group = group if group in GROUPS and own != TABLE else own
    if group not in (*GROUPS, TABLE):
        raise SchemaError(f"{group!r} is not a group; groups are {', '.join(GROUPS)}")
    version = dataset.attrs.get("twotower_schema")
    if version != SCHEMA_VERSION:
        raise SchemaError(f"{group} has schema {version}; this version reads {SCHEMA_VERSION}")
    if group == TABLE:
        _check_table(dataset)
        return
    known = GROUPS[group]
    for name in dataset.data_vars:
        if name not in known:
            raise SchemaError(f"{group} has no variable {name!r}; it has {', '.join(known)}")
    for name, variable in known.items():
        if name in dataset.data_vars:
            array = dataset[name]
            if variable.kind == "bool" and array.dtype.kind == "f" and _some_missing(dataset):
                variable = replace(variable, kind="float")  # missing prompts are NaN
            _check_variable(f"{group}.{name}", array, variable)
        elif variable.required:
            raise SchemaError(f"{group} lacks the variable {name!r}")
    for dim in dataset.dims:
        if dim not in DIMS:
            raise SchemaError(f"{group} has a dim {dim!r}; dims are {', '.join(DIMS)}")
        if dim not in dataset.coords:
            raise SchemaError(f"{group} has no coordinate for its dim {dim!r}")
    for name, variable in COORDINATES.items():
        if name in dataset.coords:
            _check_variable(f"{group}.{name}", dataset[name], variable)
        elif set(variable.dims) <= set(dataset.dims) and name not in OPTIONAL:
            raise SchemaError(f"{group} lacks the coordinate {name!r}")


def _some_missing(dataset: xr.Dataset) -> bool:
    return any(name in dataset.coords for name in MISSING)


def _check_table(table: xr.Dataset) -> None:
    for name, array in table.data_vars.items():
        _check_described(str(name), array)
    for dim in table.dims:
        if dim not in table.coords:
            raise SchemaError(f"a table has no coordinate for its dim {dim!r}")


def _check_variable(name: str, array: xr.DataArray, variable: Variable) -> None:
    if array.dims != variable.dims:
        raise SchemaError(f"{name} has dims {array.dims}, not {variable.dims}")
    if array.dtype.kind not in _KINDS[variable.kind]:
        raise SchemaError(f"{name} has dtype {array.dtype}, not {variable.kind}")
    _check_described(name, array)


def _check_described(name: str, array: xr.DataArray) -> None:
    for attribute in ("long_name", "units", "reference"):
        if not array.attrs.get(attribute):
            raise SchemaError(f"{name} lacks the attribute {attribute!r}")
