"""Save and open runs: one Zarr v3 store per tree of datasets."""

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
    """Make a run: check datasets by group and join them under one root."""
    import xarray as xr

    for name, dataset in groups.items():
        check_dataset(dataset, name)
    about = {"twotower_schema": SCHEMA_VERSION, "groups": json.dumps(sorted(groups))}
    root = xr.Dataset(attrs={**attributes, **about})
    return xr.DataTree.from_dict({"/": root, **groups})


def check_tree(tree: xr.DataTree) -> None:
    """Check that a tree is a valid run.

    Raises
    ------
    SchemaError
        If a group is unknown or does not match its schema.
    """
    if tree.data_vars or not tree.children:
        raise SchemaError("a run has groups, and no variables at its root")
    if tree.attrs.get("twotower_schema") != SCHEMA_VERSION:
        raise SchemaError(
            f"this is not a twotower run of schema {SCHEMA_VERSION} (its root says "
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

    The store is written next to `path` and moved there when complete.

    Parameters
    ----------
    run
        Result of `twotower.analyze` or of a measure, or a group of a run.
    path
        A folder, usually ending in ".zarr", or a URL such as s3://bucket/run.zarr.
    overwrite
        Whether to replace an existing store.

    Returns
    -------
    Path, or str for a URL

    Raises
    ------
    SchemaError
        If it does not match the schema.
    StoreError
        If `path` already exists, or cannot be written.
    """
    import xarray as xr

    if isinstance(run, xr.DataTree) and "twotower_group" in run.attrs:
        run = run.to_dataset(inherit=False)
    if isinstance(run, xr.Dataset):
        run = make_tree({run.attrs.get("twotower_group", ""): run}, _root_attributes(run))
    if not isinstance(run, xr.DataTree):
        raise SchemaError(f"a {type(run).__name__} is not a run; save the result of a measure")
    run = run.copy()
    run.attrs["groups"] = json.dumps(sorted(run.children))
    check_tree(run)
    place = check_place(path, overwrite)
    place.replace(
        lambda store: run.to_zarr(store, mode="w-", zarr_format=3, consolidated=False), overwrite
    )
    return str(place) if place.remote else place.path


def check_place(path: str | Path, overwrite: bool = False) -> Place:
    """Check that a run can be saved at a path, before it is measured.

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
        If an existing store may not be replaced, or the path is not writable.
    """
    yes_or_no("overwrite", overwrite)
    place = Place(path)
    if place.holds():
        if not overwrite:
            raise StoreError(f"{place} exists already; pass overwrite=True or another path")
        _require_run(place)  # never remove anything but a run
    place.require_writable()
    return place


def open(path: str | Path | Place) -> xr.DataTree:
    """Open a saved run, or a run measured in units, also while it is running.

    Arrays are lazy (dask): chunks are read when they are computed or shown, and damaged chunks
    raise errors only then. `xarray.open_datatree` also works; this function adds the check of
    the schema.

    Parameters
    ----------
    path
        The store: a path, or a URL such as s3://bucket/run.zarr.

    Returns
    -------
    xarray.DataTree
        A run; for several models, tasks or seeds, a tree with one child for each. While units
        are missing, every dataset has a coordinate `measured` (prompt), and unmeasured prompts
        have missing values (NaN; texts: ""). Prompts with non-finite logits are also missing;
        the coordinate `finite` (prompt) marks them.

    Raises
    ------
    StoreError
        If there is no store, it is not of twotower, or its groups or variables are damaged.
    """
    # Imported here, because the package must import without numpy.
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
    """Return a list of names from a JSON attribute of the root; empty without the attribute.

    Raises
    ------
    SchemaError
        If it is not a list of texts.
    """
    try:
        found = json.loads(tree.attrs.get(attribute, "[]"))
    except (TypeError, ValueError):
        found = None
    if not isinstance(found, list) or not all(isinstance(name, str) for name in found):
        raise SchemaError(f"its attribute {attribute} is not a list of names")
    return found


def _require_run(place: Place) -> xr.DataTree:
    """Open the tree at a place; raise StoreError unless its root marks it as a run."""
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
