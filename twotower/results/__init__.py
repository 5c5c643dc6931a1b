"""Results: the schema of every dataset, where it comes from, and its store."""

from .provenance import provenance
from .schema import GROUPS, check_dataset, make_dataset
from .store import check_tree, make_tree, open, save

__all__ = [
    "GROUPS",
    "check_dataset",
    "check_tree",
    "make_dataset",
    "make_tree",
    "open",
    "provenance",
    "save",
]
