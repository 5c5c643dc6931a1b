"""Measures: (model, prompts) to labelled datasets."""

from .analyze import analyze
from .effects import head_effects
from .heads import in_context_heads
from .predict import predict
from .scores import two_tower_scores
from .towers import attribution, ov_labels, qk_similarity

__all__ = [
    "analyze",
    "attribution",
    "head_effects",
    "in_context_heads",
    "ov_labels",
    "predict",
    "qk_similarity",
    "two_tower_scores",
]
