"""Saving and opening runs: one Zarr v3 store for a tree of datasets."""

from __future__ import annotations

import shutil
import uuid
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import SchemaError, StoreError
from .schema import SCHEMA_VERSION, check_dataset

if TYPE_CHECKING:
    import xarray as xr


def make_tree(groups: Mapping[str, xr.Dataset], attributes: Mapping[str, Any]) -> xr.DataTree:
    """A run: datasets by group, each checked, under one root."""
    import xarray as xr

    for name, dataset in groups.items():
        check_dataset(dataset, name)
    root = xr.Dataset(attrs={"twotower_schema": SCHEMA_VERSION, **attributes})
    return xr.DataTree.from_dict({"/": root, **groups})


def check_tree(tree: xr.DataTree) -> None:
    """Refuse a tree that is no run.

    Raises
    ------
    SchemaError
        If a group is unknown or does not have its form.
    """
    if tree.attrs.get("twotower_schema") != SCHEMA_VERSION:
        raise SchemaError(
            f"this is no twotower run of schema {SCHEMA_VERSION} (its root says "
            f"{tree.attrs.get('twotower_schema')!r})"
        )
    for name, node in tree.children.items():
        check_dataset(node.to_dataset(inherit=False), name)


def save(run: xr.DataTree | xr.Dataset, path: str | Path, overwrite: bool = False) -> Path:
    """Write a run, or one dataset of it, as a Zarr v3 store.

    The store is written beside its place and moved there when it is whole.

    Parameters
    ----------
    run
        What `twotower.analyze` or a measure returned.
    path
        A folder, by custom ending in ".zarr".
    overwrite
        Whether a store that is there may be replaced.

    Returns
    -------
    Path

    Raises
    ------
    SchemaError
        If it does not have the schema's form.
    StoreError
        If something is at `path` already, or it cannot be written.
    """
    import xarray as xr

    if isinstance(run, xr.Dataset):
        run = make_tree({run.attrs.get("twotower_group", ""): run}, _root_attributes(run))
    check_tree(run)
    path = Path(path)
    if path.exists():
        if not overwrite:
            raise StoreError(f"{path} exists already; pass overwrite=True or another path")
        _require_run(path)  # never remove what is not a run
    work = path.with_name(f".{path.name}-{uuid.uuid4().hex[:8]}")
    old = work.with_name(f"{work.name}-old")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        run.to_zarr(work, mode="w-", zarr_format=3, consolidated=False)
        if path.exists():
            path.rename(old)  # so that one of the two is there at every moment
        work.rename(path)
    except OSError as error:
        raise StoreError(f"{path} cannot be written: {error}") from error
    finally:
        if old.exists() and not path.exists():
            old.rename(path)
        for leftover in (work, old):
            shutil.rmtree(leftover, ignore_errors=True)
    return path


def open(path: str | Path) -> xr.DataTree:
    """Open a run that `save` wrote.

    Values are read when they are used. `xarray.open_datatree` opens it as well; this adds
    the check of the schema.

    Parameters
    ----------
    path
        The store.

    Returns
    -------
    xarray.DataTree

    Raises
    ------
    StoreError
        If there is no store, or it is foreign or damaged.
    """
    tree = _require_run(Path(path))
    try:
        check_tree(tree)
    except SchemaError as error:
        raise StoreError(f"{path} is not a run that this version reads: {error}") from error
    return tree


def _require_run(path: Path) -> xr.DataTree:
    """The tree at a path, if it says of itself that it is a run."""
    import xarray as xr

    if not path.exists():
        raise StoreError(f"there is no store at {path}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = xr.open_datatree(path, engine="zarr", chunks=None, consolidated=False)
    except Exception as error:
        raise StoreError(
            f"{path} cannot be read as a Zarr store ({type(error).__name__}: "
            f"{' '.join(str(error).split())[:200]})"
        ) from error
    if "twotower_schema" not in tree.attrs:
        raise StoreError(f"{path} is a Zarr store, but not a twotower run")
    return tree


def _root_attributes(dataset: xr.Dataset) -> dict[str, Any]:
    return {k: v for k, v in dataset.attrs.items() if k not in ("twotower_group", "settings")}
