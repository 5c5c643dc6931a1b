"""Schema of every dataset: variables, dims, units and definitions.

The variables of each group are in `groups/`, by subject; `forms.py` checks datasets when they are
made, saved or opened.

Notation of Yu & Ananiadou (2024, arXiv 2402.02872): layer l, head h, position p, last position T.
x_p^l is the residual stream entering layer l, z the head's output before the output projection,
W_O^h the head's slice of the output projection, a the attention weights, v the values.
"""

from __future__ import annotations

from ..errors import SchemaError
from .coordinates import COORDINATES
from .groups import ANSWERS, EDGES, EFFECTS, HEADS
from .variable import DIMS, PAPER, Variable

__all__ = [
    "BY_POSITION",
    "COORDINATES",
    "DIMS",
    "GROUPS",
    "PAPER",
    "SCHEMA_VERSION",
    "TABLE",
    "Variable",
    "head_columns",
]

SCHEMA_VERSION = 1

GROUPS: dict[str, dict[str, Variable]] = {**ANSWERS, **EFFECTS, **EDGES, **HEADS}

TABLE = "table"
"""Group of an experiment's own datasets, with any variables and dims, each described."""


BY_POSITION = {
    "attention": ("qk", "attention"),
    "score": ("qk", "score"),
    "score_content": ("qk", "score_content"),
    "label_logit": ("ov", "label_logit"),
}
"""Values of a head at each position, with their group and variable."""


def head_columns() -> dict[str, tuple[str, Variable]]:
    """Return the columns of heads by name, in order, with their first group.

    Raises
    ------
    SchemaError
        If two groups have different columns of the same name.
    """
    found: dict[str, tuple[str, Variable]] = {}
    for group, variables in GROUPS.items():
        for name, variable in variables.items():
            if variable.title and set(variable.dims) - {"prompt", "label"} == {"layer", "head"}:
                first, known = found.setdefault(name, (group, variable))
                if known.title != variable.title:
                    raise SchemaError(
                        f"the groups {first!r} and {group!r} have different columns named "
                        f"{name!r}; rename one of them"
                    )
    return found
