"""A store written unit by unit: created completely at the start, then filled by region.

A unit is a block of prompts of one part of a run (a model, a task, a seed). Every variable with a
dim `prompt` has one chunk per unit, so two units never write the same object. The group `units` is
the ledger: it marks a unit as done only after the unit's chunks are on disk.
"""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ..errors import StoreError
from .findings import Findings
from .forms import MISSING, check_dataset, make_dataset, with_booleans
from .missing import mark_missing
from .place import Place
from .schema import GROUPS, SCHEMA_VERSION

if TYPE_CHECKING:
    import xarray as xr

DONE, FAILED = "done", "failed"
ADDED = ("not_finite", "proof")
"""Columns of the ledger that stores of older versions lack."""

REPORTED = ("state", "seconds", "finished", "worker", "error", *ADDED)
"""Columns of the ledger written after a unit is measured."""

PATIENCE = 300.0
"""Seconds during which a refused write is retried."""


class Unit(NamedTuple):
    """A block of prompts of one part of a run."""

    number: int
    part: str
    start: int
    stop: int

    def __str__(self) -> str:
        where = f"{self.part}, " if self.part else ""
        return f"unit {self.number} ({where}prompts {self.start} to {self.stop - 1})"


def plan_units(sizes: Mapping[str, int], size: int) -> list[Unit]:
    """Return all units of a run, from the number of prompts of each part."""
    blocks = [
        (part, start, min(start + size, n))
        for part, n in sizes.items()
        for start in range(0, n, size)
    ]
    return [Unit(number, *block) for number, block in enumerate(blocks)]


class UnitStore:
    """Store of a run that is measured in units.

    Parameters
    ----------
    place
        A path or URL.
    patience
        Seconds during which a refused write is retried.
    """

    def __init__(self, place: str | Path | Place, patience: float = PATIENCE) -> None:
        self.place = Place(place)
        self.patience = patience

    def create(
        self,
        parts: Mapping[str, tuple[Mapping[str, xr.Dataset], Mapping[str, Any]]],
        units: Sequence[Unit],
        size: int,
        attributes: Mapping[str, Any],
        overwrite: bool = False,
    ) -> None:
        """Create the store with all coordinates and metadata, but no measured values.

        Parameters
        ----------
        parts
            Datasets by group, and attributes, by name of the part. The only part of a run has
            the name "". Variables with a dim `prompt` are not written, except in the group
            `prompts`.
        units, size
            All units, and the number of prompts per unit.
        attributes
            Attributes of the root.
        overwrite
            Whether to replace an existing store.
        """
        import xarray as xr

        nodes: dict[str, xr.Dataset] = {}
        forms: dict[str, dict[str, Any]] = {}
        for part, (groups, about) in parts.items():
            listed = json.dumps(sorted(groups if part else {*groups, "units"}))
            about = {**about, "twotower_schema": SCHEMA_VERSION, "groups": listed}
            nodes[f"/{part}"] = xr.Dataset(attrs=about)
            for name, dataset in groups.items():
                check_dataset(dataset, name)
                # The ledger records missing prompts, so the store keeps booleans.
                dataset = with_booleans(dataset.drop_vars(MISSING, errors="ignore"))
                path = f"/{part}/{name}" if part else f"/{name}"
                names = [] if name == "prompts" else measured(dataset)
                nodes[path], forms[path] = _unwritten(dataset, names, size)
        nodes["/units"], forms["/units"] = _unwritten(_ledger(units), REPORTED, 1)
        if list(parts) != [""]:
            listed = json.dumps(sorted({*parts, "units"}))
            about = {"twotower_schema": SCHEMA_VERSION, "groups": listed}
            nodes["/"] = xr.Dataset(attrs={**about, "twotower_parts": json.dumps(list(parts))})
        nodes["/"].attrs.update(attributes)

        def write(store: Any) -> None:
            xr.DataTree.from_dict(nodes).to_zarr(
                store,
                mode="w-",
                zarr_format=3,
                consolidated=False,
                compute=False,
                encoding=forms,
            )

        self.place.replace(write, overwrite)

    def attributes(self, part: str = "") -> dict[str, Any]:
        """Return the attributes of the root, or of a part.

        Raises
        ------
        StoreError
            If there is no Zarr store.
        """
        import zarr

        try:
            return dict(zarr.open_group(self.place.store(True), path=part, mode="r").attrs)
        except Exception as error:
            raise self.place.failed("cannot be read as a Zarr store", error) from error

    def units(self) -> list[Unit]:
        """Return all planned units."""
        columns = (column.tolist() for column in self._columns("part", "start", "stop"))
        return [Unit(i, *row) for i, row in enumerate(zip(*columns, strict=True))]

    def states(self) -> list[str]:
        """Return the state of each unit: "done", "failed", or "" if it is missing."""
        return [str(state) for state in self._columns("state")[0]]

    def write(self, unit: Unit, groups: Mapping[str, xr.Dataset]) -> None:
        """Write a unit's values into its region, and flush them to disk.

        Parameters
        ----------
        unit
            The unit.
        groups
            Datasets by group, over the unit's prompts. They are left-padded to the longest
            prompt of the run.
        """
        for name, dataset in groups.items():
            names = measured(dataset)
            if name == "prompts" or not names:
                continue
            path = f"{unit.part}/{name}".lstrip("/")
            values = self._padded(with_booleans(dataset[names]), path)
            self._patiently(partial(self._region, unit, values, path))

    def _padded(self, dataset: xr.Dataset, path: str) -> xr.Dataset:
        if "position" in dataset.dims:
            import zarr

            store = self.place.store(True)
            whole = zarr.open_array(store, path=f"{path}/position", mode="r")[:]
            dataset = dataset.reset_coords(drop=True).reindex(position=whole)
        return dataset.drop_vars(list(dataset.coords))

    def _region(self, unit: Unit, values: xr.Dataset, path: str) -> None:
        values.to_zarr(
            self.place.store(),
            group=path,
            region={"prompt": slice(unit.start, unit.stop)},
            zarr_format=3,
            consolidated=False,
            write_empty_chunks=True,
        )
        if not self.place.remote:
            self._flush(unit, values, path)

    def _flush(self, unit: Unit, values: xr.Dataset, path: str) -> None:
        """Flush a unit's chunks to disk, so that a power failure cannot lose a marked unit."""
        import zarr

        group = zarr.open_group(self.place.store(True), path=path, mode="r")
        for name in map(str, values.data_vars):
            array: Any = group[name]
            block = (unit.start // array.chunks[0], *[0] * (array.ndim - 1))
            file = self.place.path / path / name / array.metadata.encode_chunk_key(block)
            for entry in (file, file.parent):
                handle = os.open(entry, os.O_RDONLY)
                try:
                    os.fsync(handle)
                finally:
                    os.close(handle)

    def write_scores(self, part: str, scores: xr.Dataset, n: int) -> None:
        """Overwrite a part's scores, then write their number of prompts."""
        path = f"{part}/scores".lstrip("/")
        self._patiently(
            lambda: scores.to_zarr(
                self.place.store(), group=path, mode="a", zarr_format=3, consolidated=False
            )
        )
        self._set("scored", {**self.scored(), part: n})

    def scored(self) -> dict[str, int]:
        """Return the number of prompts in the scores of each part."""
        return dict(self._get("scored"))

    def mark(self, unit: Unit, state: str, **report: Any) -> None:
        """Write a unit's report to the ledger, and then its state.

        Parameters
        ----------
        unit, state
            The unit, and "done", "failed" or "".
        **report
            seconds, finished, worker, error, not_finite, proof.
        """

        def write() -> None:
            ledger = self._ledger("r+")
            for name, value in [*report.items(), ("state", state)]:
                ledger[name][unit.number] = value

        self._patiently(write)

    def beat(self, driver: Mapping[str, Any] | None) -> None:
        """Record the driver of the run; None if it has ended."""
        self._set("driver", driver or {})

    def driver(self) -> dict[str, Any]:
        """Return the last recorded driver of the run; empty without a driver."""
        return dict(self._get("driver"))

    def _get(self, name: str) -> Any:
        text = str(self._columns(name)[0].item())
        return json.loads(text) if text else {}

    def _set(self, name: str, value: Mapping[str, Any]) -> None:
        def write() -> None:
            self._ledger("r+")[name][...] = json.dumps(value) if value else ""

        self._patiently(write)

    def clean(self) -> None:
        """Remove incomplete files of killed writers."""
        if not self.place.remote:
            for path in self.place.path.rglob("*.partial"):
                path.unlink(missing_ok=True)

    def ledger(self, *names: str) -> xr.Dataset:
        """Return the ledger: the report of every unit.

        Parameters
        ----------
        *names
            Variables of the group `units`; by default all with the dim `unit`.

        Raises
        ------
        StoreError
            If this is not a run measured in units.
        """
        import xarray as xr

        names = names or ("part", "start", "stop", *REPORTED)
        columns = zip(names, self._columns(*names), strict=True)
        return xr.Dataset({name: ("unit", column) for name, column in columns})

    def _columns(self, *names: str) -> list[np.ndarray]:
        """Return columns of the ledger."""
        if not self.place.holds():
            raise StoreError(f"there is no store at {self.place}")
        try:
            ledger = self._ledger()
            return [self._column(ledger, name) for name in names]
        except StoreError:
            raise
        except KeyError as error:
            raise StoreError(f"{self.place} is incomplete: {error} is missing") from error
        except Exception as error:
            raise self.place.failed("cannot be read", error) from error

    def _column(self, ledger: Any, name: str) -> np.ndarray:
        if name in ADDED and name not in ledger:
            return np.full(ledger["state"].shape, "", dtype=object)
        return np.asarray(ledger[name][...])

    def complete(self) -> None:
        """Add missing columns to the ledger of an older version."""
        import xarray as xr

        ledger = self._ledger()
        names = [name for name in ADDED if name not in ledger]
        if not names:
            return
        columns = _ledger(self.units())[names].drop_vars("unit")
        columns, forms = _unwritten(columns, names, 1)
        # Keep the group's attributes, which would be lost otherwise.
        columns = xr.Dataset({name: columns[name] for name in names}, attrs=dict(ledger.attrs))
        self._patiently(
            lambda: columns.to_zarr(
                self.place.store(),
                group="units",
                mode="a",
                zarr_format=3,
                consolidated=False,
                encoding=forms,
            )
        )

    def _ledger(self, mode: Any = "r") -> Any:
        import zarr

        try:
            store = self.place.store(mode == "r")
            return zarr.open_group(store, path="units", mode=mode)
        except Exception as error:
            if _refused(error) and not isinstance(error, FileNotFoundError):
                raise
            raise StoreError(
                f"{self.place} is not a run measured in units, or is incomplete"
            ) from error

    def _patiently(self, write: Callable[[], object]) -> None:
        """Write, and retry while the store refuses, for at most `patience` seconds."""
        started, pause = time.monotonic(), 0.1
        while True:
            try:
                write()
                return
            except StoreError:  # the store does not exist
                raise
            except FileNotFoundError as error:  # the store was removed
                raise self.place.failed("cannot be written", error) from error
            except Exception as error:
                if not _refused(error):
                    raise
                if time.monotonic() + pause > started + self.patience:
                    raise self.place.failed("cannot be written", error) from error
            time.sleep(pause)
            pause = min(2 * pause, 10.0)


def _refused(error: Exception) -> bool:
    """Check whether a store refused a write, which a retry may solve."""
    return isinstance(error, OSError) or type(error).__module__.startswith("obstore")


def mark_units(run: xr.DataTree, ledger: xr.Dataset, part: str) -> xr.DataTree:
    """Mark the missing prompts of a part, if any, from the ledger.

    A prompt is missing if it is not measured yet (coordinate `measured`) or if its logits are not
    finite (coordinate `finite`). Booleans become floats, so that missing ones can be NaN.
    """
    here = ledger["part"].values == part
    done = np.zeros(int(ledger["stop"].values[here].max(initial=0)), dtype=bool)
    finite, values = np.ones_like(done), Counter[str]()
    proofs: list[str] = []
    columns = (ledger[name].values[here] for name in ("state", "start", "stop", *ADDED))
    for state, start, stop, text, proof in zip(*columns, strict=True):
        done[start:stop] = state == DONE
        proofs += [str(proof)] if state == DONE and proof else []
        if state == DONE and text:
            report = json.loads(str(text))
            finite[report["prompts"]] = False
            values.update(report["values"])
    about = {"proof": Findings.joined(proofs)} if proofs else {}
    if done.all() and finite.all() and not values and not about:
        return run
    values["scores"] = sum(values[name] for name in ("qk", "ov", "effects"))
    marked = run.copy()
    missing = int((~finite).sum())
    marked.attrs.update(about, not_finite=missing)
    for name, node in run.children.items():
        if name not in GROUPS or name == "units":
            continue
        dataset = node.to_dataset(inherit=False).assign_attrs(about)
        if name != "prompts" and "prompt" in dataset.dims:
            dataset = mark_missing(dataset, measured=done, finite=finite)
        marked[name] = dataset.assign_attrs(not_finite=missing, not_finite_values=values[name])
    return marked


def report_missing(unit: Unit, groups: Mapping[str, xr.Dataset]) -> str:
    """Return a unit's entry of the ledger's column `not_finite`: JSON, or "" if all is finite.

    Parameters
    ----------
    unit
        The unit.
    groups
        Its datasets, over its own prompts.
    """
    prompts: set[int] = set()
    for dataset in groups.values():
        if "finite" in dataset.coords:
            prompts |= {unit.start + int(i) for i in np.flatnonzero(~dataset["finite"].values)}
    counts = {name: int(x.attrs.get("not_finite_values", 0)) for name, x in groups.items()}
    values = {name: count for name, count in counts.items() if count}
    if not prompts and not values:
        return ""
    return json.dumps({"prompts": sorted(prompts), "values": values})


def measured(dataset: xr.Dataset) -> list[str]:
    """Return the names of the variables that units write."""
    return [str(name) for name, array in dataset.data_vars.items() if "prompt" in array.dims]


def _unwritten(
    dataset: xr.Dataset, names: Sequence[str], size: int
) -> tuple[xr.Dataset, dict[str, Any]]:
    """Return a dataset with empty arrays for named variables, and their Zarr encodings."""
    from dask import array as dask
    from zarr.codecs import ZstdCodec

    forms = {}
    dataset = dataset.copy()
    for name in names:
        array = dataset[name]
        text = array.dtype.kind not in "fiub"
        dtype: Any = np.dtypes.StringDType() if text else array.dtype
        empty: Any = "" if text else np.nan if array.dtype.kind == "f" else array.dtype.type(0)
        chunks = (min(size, array.shape[0]), *array.shape[1:])
        dataset[name] = array.copy(data=dask.full(array.shape, empty, dtype=dtype, chunks=chunks))
        forms[name] = {
            "chunks": chunks,
            "compressors": (ZstdCodec(level=1, checksum=True),),
            "chunk_key_encoding": {"name": "default", "separator": "."},
            "fill_value": empty,
        }
    return dataset, forms


def _ledger(units: Sequence[Unit]) -> xr.Dataset:
    n, texts = len(units), ("state", "worker", "error", *ADDED)
    values = {
        "part": np.array([unit.part for unit in units], dtype=object),
        "start": np.array([unit.start for unit in units]),
        "stop": np.array([unit.stop for unit in units]),
        "seconds": np.full(n, np.nan),
        "finished": np.full(n, np.nan),
        **{name: np.full(n, "", dtype=object) for name in texts},
        **{name: np.array("", dtype=object) for name in ("driver", "scored")},
    }
    return make_dataset("units", values, {"unit": np.arange(n)}, {})
