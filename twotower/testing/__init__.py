"""Models with a known mechanism, for testing what finds mechanisms."""

from .planting import ARCHITECTURES, DISTRACTORS, Planting

__all__ = ["ARCHITECTURES", "DISTRACTORS", "Planting"]
