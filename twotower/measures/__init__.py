"""Measures: (model, prompts) to labelled datasets."""

from .agreement import Agreement, agreement
from .analyze import analyze
from .bias import bias_reduction, label_bias, majority_label, recent_label
from .effects import head_effects
from .gradients import attribution_patching
from .groups import greedy_heads, group_effects, pair_effects, strongest_group, subset_effects
from .heads import in_context_heads
from .predict import predict
from .residuals import residual_streams
from .scores import two_tower_scores
from .shares import attention_shares
from .towers import attribution, ov_labels, qk_similarity
from .tracing import causal_tracing

__all__ = [
    "Agreement",
    "agreement",
    "analyze",
    "attention_shares",
    "attribution",
    "attribution_patching",
    "bias_reduction",
    "causal_tracing",
    "greedy_heads",
    "group_effects",
    "head_effects",
    "in_context_heads",
    "label_bias",
    "majority_label",
    "ov_labels",
    "pair_effects",
    "predict",
    "qk_similarity",
    "recent_label",
    "residual_streams",
    "strongest_group",
    "subset_effects",
    "two_tower_scores",
]
