"""Measures: (model, prompts) to labelled datasets.

Names are imported when they are first used: those that only read datasets need no torch.
No module has the name of a function here, which it would hide.
"""

import lazy_loader as _lazy

__getattr__, __dir__, __all__ = _lazy.attach(
    __name__,
    submod_attrs={
        "analysis": ["analyze"],
        "bias": ["bias_reduction", "label_bias", "majority_label", "recent_label"],
        "comparison": ["Agreement", "agreement"],
        "effects": ["head_effects"],
        "gradients": ["attribution_patching"],
        "groups": [
            "greedy_heads",
            "group_effects",
            "pair_effects",
            "strongest_group",
            "subset_effects",
        ],
        "heads": ["in_context_heads"],
        "predictions": ["predict"],
        "residuals": ["residual_streams"],
        "scores": ["two_tower_scores"],
        "shares": ["attention_shares"],
        "towers": ["attribution", "ov_labels", "qk_similarity"],
        "tracing": ["causal_tracing"],
    },
)
