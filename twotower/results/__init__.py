"""Results: schema, provenance and storage of datasets."""

from .forms import check_dataset, make_dataset, make_table, measured_prompts
from .provenance import provenance
from .schema import GROUPS, Variable
from .store import check_tree, make_tree, open, save

__all__ = [
    "GROUPS",
    "Variable",
    "check_dataset",
    "check_tree",
    "make_dataset",
    "make_table",
    "make_tree",
    "measured_prompts",
    "open",
    "provenance",
    "save",
]
