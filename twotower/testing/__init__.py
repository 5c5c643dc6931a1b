"""Models with a known mechanism, for testing methods that find mechanisms."""

from .kinds import PlantedKinds
from .planting import ARCHITECTURES, DISTRACTORS, Planting

__all__ = ["ARCHITECTURES", "DISTRACTORS", "PlantedKinds", "Planting"]
