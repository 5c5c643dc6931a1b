"""The files of experiments/ as modules."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType

from twotower.experiments.suite import experiments_folder


def script(name: str) -> ModuleType:
    """A file of the experiments by its name, without .py."""
    folder = str(experiments_folder())
    if folder not in sys.path:
        sys.path.append(folder)
    return importlib.import_module(name)
