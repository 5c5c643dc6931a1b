"""Adapters: one file per family. A new file is found by itself."""

from __future__ import annotations

import importlib
import pkgutil

from ..architecture import Architecture


def _adapters() -> list[type[Architecture]]:
    """Return the adapters defined in this folder's files, in alphabetical order of the files."""
    found: list[type[Architecture]] = []
    for file in pkgutil.iter_modules(__path__):
        module = importlib.import_module(f"{__name__}.{file.name}")
        for item in vars(module).values():
            own = isinstance(item, type) and item.__module__ == module.__name__
            if own and issubclass(item, Architecture) and "model_types" in vars(item):
                found.append(item)
    return found


ADAPTERS = _adapters()
