"""Variables of every group, by subject."""

from .answers import ANSWERS
from .edges import EDGES
from .effects import EFFECTS
from .heads import HEADS

__all__ = ["ANSWERS", "EDGES", "EFFECTS", "HEADS"]
