"""Saving and opening runs: one Zarr v3 store for a tree of datasets."""

from __future__ import annotations

import json
import os
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
    missing = set(json.loads(tree.attrs.get("groups", "[]"))) - set(tree.children)
    if missing:
        raise SchemaError(f"the groups {', '.join(sorted(missing))} are missing")
    for name, node in tree.children.items():
        check_dataset(node.to_dataset(inherit=False), name)


def save(run: xr.DataTree | xr.Dataset, path: str | Path, overwrite: bool = False) -> Path:
    """Write a run, or one dataset of it, as a Zarr v3 store.

    The store is written beside its place and moved there when it is whole.

    Parameters
    ----------
    run
        What `twotower.analyze` or a measure returned, or a group of a run.
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

    if isinstance(run, xr.DataTree) and "twotower_group" in run.attrs:
        run = run.to_dataset(inherit=False)
    if isinstance(run, xr.Dataset):
        run = make_tree({run.attrs.get("twotower_group", ""): run}, _root_attributes(run))
    if not isinstance(run, xr.DataTree):
        raise SchemaError(f"a {type(run).__name__} is no run; save what a measure returned")
    run = run.copy()
    run.attrs["groups"] = json.dumps(sorted(run.children))
    check_tree(run)
    path = check_place(path, overwrite)
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


def check_place(path: str | Path, overwrite: bool = False) -> Path:
    """Refuse a place at which a run cannot be saved; better before it is measured.

    Parameters
    ----------
    path, overwrite
        As in `save`.

    Returns
    -------
    Path
        With "~" expanded.

    Raises
    ------
    StoreError
        If something is there that may not be replaced, or nothing can be written there.
    """
    path = _as_path(path)
    if _exists(path):
        if not overwrite:
            raise StoreError(f"{path} exists already; pass overwrite=True or another path")
        _require_run(path)  # never remove what is not a run
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        raise StoreError(f"{path} cannot be written: {folder} is no folder that can be written to")
    return path


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError as error:  # a name that is too long, or a folder that cannot be looked into
        raise StoreError(f"{path} is no place for a store: {error.strerror}") from error


def _as_path(path: str | Path) -> Path:
    if not isinstance(path, (str, Path)):
        raise StoreError(f"{path!r} is no path")
    return Path(path).expanduser()


def open(path: str | Path) -> xr.DataTree:
    """Open a run that `save` wrote.

    Values are read when they are used, so damage among them shows only then.
    `xarray.open_datatree` opens it as well; this adds the check of the schema.

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
        If there is no store, or it is foreign, or groups or variables of it are damaged.
    """
    path = _as_path(path)
    tree = _require_run(path)
    try:
        check_tree(tree)
    except SchemaError as error:
        raise StoreError(f"{path} is not a run that this version reads: {error}") from error
    return tree


def _require_run(path: Path) -> xr.DataTree:
    """The tree at a path, if it says of itself that it is a run."""
    import xarray as xr

    if not _exists(path):
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
