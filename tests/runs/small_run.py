"""A small run, and what tells two stores apart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from twotower.runs.configuration import Configuration

MEASURED = ("predictions", "qk")
"""Measures of most runs in these tests: how a run goes on does not depend on them."""

ALL = Configuration().measures


def small(checkpoint: Path, output: Path | str, **settings: Any) -> Configuration:
    """Six units of two prompts."""
    about = {
        "n": 12, "unit_size": 2, "shots": 2, "batch_size": 2, "threads": 1, "measures": MEASURED,
    }  # fmt: skip
    return Configuration(model=str(checkpoint), output=str(output), **{**about, **settings})


def chunks(store: Path) -> dict[str, bytes]:
    """Bytes of every array chunk of a store, but for those that say how units went."""
    return {
        str(path.relative_to(store)): path.read_bytes()
        for path in sorted(store.rglob("*"))
        if path.is_file()
        and path.name != "zarr.json"
        and path.relative_to(store).parts[0] != "units"
    }
