"""The tasks that come with the package."""

from __future__ import annotations

from importlib import resources


def bundled_tasks() -> list[str]:
    """Return the names of the bundled tasks of classes, for `load_task`."""
    return _names("tasks")


def bundled_pairs() -> list[str]:
    """Return the names of the bundled tasks of pairs, for `load_pairs`."""
    return _names("pairs")


def _names(folder: str) -> list[str]:
    files = (resources.files(__package__) / folder).iterdir()
    return sorted(f.name.removesuffix(".json") for f in files if f.name.endswith(".json"))
