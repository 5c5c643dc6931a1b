"""Saving and opening runs: one Zarr v3 store for a tree of datasets."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checks import yes_or_no
from ..errors import SchemaError, StoreError
from .forms import check_dataset
from .place import Place
from .schema import SCHEMA_VERSION

if TYPE_CHECKING:
    import xarray as xr


def make_tree(groups: Mapping[str, xr.Dataset], attributes: Mapping[str, Any]) -> xr.DataTree:
    """A run: datasets by group, each checked, under one root."""
    import xarray as xr

    for name, dataset in groups.items():
        check_dataset(dataset, name)
    about = {"twotower_schema": SCHEMA_VERSION, "groups": json.dumps(sorted(groups))}
    root = xr.Dataset(attrs={**attributes, **about})
    return xr.DataTree.from_dict({"/": root, **groups})


def check_tree(tree: xr.DataTree) -> None:
    """Refuse a tree that is no run.

    Raises
    ------
    SchemaError
        If a group is unknown or does not have its form.
    """
    if tree.data_vars or not tree.children:
        raise SchemaError("a run has groups, and no variables beside them")
    if tree.attrs.get("twotower_schema") != SCHEMA_VERSION:
        raise SchemaError(
            f"this is no twotower run of schema {SCHEMA_VERSION} (its root says "
            f"{tree.attrs.get('twotower_schema')!r})"
        )
    missing = set(_names(tree, "groups")) - set(tree.children)
    if missing:
        raise SchemaError(f"the groups {', '.join(sorted(missing))} are missing")
    parts = _names(tree, "twotower_parts")
    for name, node in tree.children.items():
        if name in parts:
            check_tree(node)
        else:
            check_dataset(node.to_dataset(inherit=False), name)


def save(run: xr.DataTree | xr.Dataset, path: str | Path, overwrite: bool = False) -> Path | str:
    """Write a run, or one dataset of it, as a Zarr v3 store.

    The store is written beside its place and moved there when it is whole.

    Parameters
    ----------
    run
        What `twotower.analyze` or a measure returned, or a group of a run.
    path
        A folder, by custom ending in ".zarr", or a URL such as s3://bucket/run.zarr.
    overwrite
        Whether a store that is there may be replaced.

    Returns
    -------
    Path, or str for a URL

    Raises
    ------
    SchemaError
        If it does not have the schema's form.
    StoreError
        If something is at `path` already, or it cannot be written.
    """
    import xarray as xr

    if isinstance(run, xr.DataTree) and "twotower_group" in run.attrs:
        run = run.to_dataset(inherit=False)
    if isinstance(run, xr.Dataset):
        run = make_tree({run.attrs.get("twotower_group", ""): run}, _root_attributes(run))
    if not isinstance(run, xr.DataTree):
        raise SchemaError(f"a {type(run).__name__} is no run; save what a measure returned")
    run = run.copy()
    run.attrs["groups"] = json.dumps(sorted(run.children))
    check_tree(run)
    place = check_place(path, overwrite)
    place.replace(
        lambda store: run.to_zarr(store, mode="w-", zarr_format=3, consolidated=False), overwrite
    )
    return str(place) if place.remote else place.path


def check_place(path: str | Path, overwrite: bool = False) -> Place:
    """Refuse a place at which a run cannot be saved; better before it is measured.

    Parameters
    ----------
    path, overwrite
        As in `save`.

    Returns
    -------
    Place

    Raises
    ------
    StoreError
        If something is there that may not be replaced, or nothing can be written there.
    """
    yes_or_no("overwrite", overwrite)
    place = Place(path)
    if place.holds():
        if not overwrite:
            raise StoreError(f"{place} exists already; pass overwrite=True or another path")
        _require_run(place)  # never remove what is not a run
    place.require_writable()
    return place


def open(path: str | Path | Place) -> xr.DataTree:
    """Open a run that `save` wrote, or one that is measured in units, even while it grows.

    Arrays are lazy (dask): values are read when they are computed or shown, chunk by
    chunk, so damage among them shows only then. `xarray.open_datatree` opens it as well;
    this adds the check of the schema.

    Parameters
    ----------
    path
        The store: a path, or a URL such as s3://bucket/run.zarr.

    Returns
    -------
    xarray.DataTree
        Of a run over several models, tasks or seeds, one child for each; else a run. While
        units are missing, every dataset has a coordinate `measured` (prompt), and the
        values of the prompts that are not measured yet are NaN (texts: ""). So are those of
        prompts whose logits are not finite; the coordinate `finite` (prompt) says which.

    Raises
    ------
    StoreError
        If there is no store, or it is foreign, or groups or variables of it are damaged.
    """
    # Needs numpy, which importing the package does not.
    from .units import ADDED, UnitStore, mark_units

    place = Place(path)
    tree = _require_run(place)
    try:
        if "units" in tree.children:
            ledger = UnitStore(place).ledger("part", "start", "stop", "state", *ADDED)
            for part in _names(tree, "twotower_parts"):
                tree[part] = mark_units(tree.children[part], ledger, part)
            if "twotower_parts" not in tree.attrs:
                tree = mark_units(tree, ledger, "")
        check_tree(tree)
    except SchemaError as error:
        raise StoreError(f"{place} is not a run that this version reads: {error}") from error
    return tree


def _names(tree: xr.DataTree, attribute: str) -> list[str]:
    """Names that the root holds as JSON; none where it holds no such attribute.

    Raises
    ------
    SchemaError
        If it is no list of texts.
    """
    try:
        found = json.loads(tree.attrs.get(attribute, "[]"))
    except (TypeError, ValueError):
        found = None
    if not isinstance(found, list) or not all(isinstance(name, str) for name in found):
        raise SchemaError(f"its attribute {attribute} is no list of names")
    return found


def _require_run(place: Place) -> xr.DataTree:
    """The tree at a place, if it says of itself that it is a run."""
    import xarray as xr

    if not place.holds():
        raise StoreError(f"there is no store at {place}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = xr.open_datatree(
                place.store(read_only=True), engine="zarr", chunks={}, consolidated=False
            )
    except Exception as error:
        raise place.failed("cannot be read as a Zarr store", error) from error
    if "twotower_schema" not in tree.attrs:
        raise StoreError(f"{place} is a Zarr store, but not a twotower run")
    return tree


def _root_attributes(dataset: xr.Dataset) -> dict[str, Any]:
    return {k: v for k, v in dataset.attrs.items() if k not in ("twotower_group", "settings")}
