from .analysis import analyze as analyze
from .bias import bias_reduction as bias_reduction
from .bias import label_bias as label_bias
from .bias import majority_label as majority_label
from .bias import recent_label as recent_label
from .comparison import Agreement as Agreement
from .comparison import agreement as agreement
from .effects import head_effects as head_effects
from .gradients import attribution_patching as attribution_patching
from .groups import greedy_heads as greedy_heads
from .groups import group_effects as group_effects
from .groups import pair_effects as pair_effects
from .groups import strongest_group as strongest_group
from .groups import subset_effects as subset_effects
from .heads import in_context_heads as in_context_heads
from .predictions import predict as predict
from .residuals import residual_streams as residual_streams
from .scores import two_tower_scores as two_tower_scores
from .shares import attention_shares as attention_shares
from .towers import attribution as attribution
from .towers import ov_labels as ov_labels
from .towers import qk_similarity as qk_similarity
from .tracing import causal_tracing as causal_tracing

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
