"""Descriptions of variables: dims, units and definitions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

PAPER = "Yu & Ananiadou 2024, arXiv:2402.02872"

DIMS = (
    "prompt",
    "layer",
    "head",
    "position",
    "label",
    "chosen",
    "group",
    "other_layer",
    "other_head",
    "step",
    "source",
    "key_source",
    "target",
    "into",
    "token",
    "feature",
    "unit",
    "edge",
    "ranking",
    "size",
)
"""All dims; every dim of a dataset has a coordinate."""


@dataclass(frozen=True)
class Variable:
    """Description of a variable.

    Parameters
    ----------
    dims
        Its dims, in order.
    kind
        "float", "int", "bool" or "str".
    long_name
        Name in words.
    reference
        Definition and its source.
    units
        "1" if dimensionless, "nat" for natural logarithms of probabilities.
    required
        Whether a dataset of the group must have it.
    title
        Short name in tables and figures. A variable of heads, (layer, head) with or without
        prompts and labels, with a title is a column of the head table, `twotower heads`, head
        maps and reports.
    format
        Format specification of a number; with a sign if 0 is the centre.
    chance
        Value of a head without effect: the centre of the colour scale.
    """

    dims: tuple[str, ...]
    kind: str
    long_name: str
    reference: str
    units: str = "1"
    required: bool = True
    title: str = ""
    format: str = "+.3f"
    chance: float = 0.0

    @property
    def signed(self) -> bool:
        """Whether numbers are written with a sign."""
        return self.format.startswith("+")


PROMPT, PROMPT_LABEL = ("prompt",), ("prompt", "label")
PROMPT_POSITION = ("prompt", "position")
PROMPT_HEAD = ("prompt", "layer", "head")

AUC: dict[str, Any] = {"format": ".3f", "chance": 0.5}
"""Display settings of an AUC."""


def auc(title: str) -> dict[str, Any]:
    """Return the display settings of an AUC with a title."""
    return {"title": title, **AUC}
