"""Find, measure and explain the attention heads by which language models learn in context.

Names are imported when they are first used, so that importing the package is quick.
"""

import lazy_loader as _lazy
import wrapt as _wrapt

# nnsight gives every object a method `save`, modules included, which would hide a name
# that is looked up lazily; so these two are here from the start.
from .results import open, save

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = _lazy.attach(
    __name__,
    submodules=["figures"],
    submod_attrs={
        "errors": [
            "CheckError",
            "FetchError",
            "FindingError",
            "InputError",
            "ModelError",
            "SchemaError",
            "StoreError",
            "TwoTowerError",
            "WorkerError",
        ],
        "intervention": ["DropPosition", "KnockOut", "Patch", "Scale", "ScaleAttention"],
        "measures": [
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
        ],
        "head": ["Head"],
        "models": ["Architecture", "Model", "load"],
        "prompts": [
            "At",
            "Prompts",
            "Task",
            "at",
            "build_prompts",
            "bundled_tasks",
            "load_task",
            "prompts_from_strings",
        ],
    },
)
__all__ += ["__version__", "open", "save"]


@_wrapt.when_imported("xarray")
def _register_accessors(_module):
    """Give datasets and runs their `.tt`; xarray is imported when it is first needed."""
    from . import accessor

    accessor.register()
