"""Measures: from model and prompts to labelled datasets. One file for each group of the schema.

Modules are imported at first use, because those that only read datasets do not need torch.
"""

import lazy_loader as _lazy

__getattr__, __dir__, __all__ = _lazy.attach(
    __name__,
    submodules=[
        "agreement",
        "analyze",
        "attribution",
        "attribution_patching",
        "bias",
        "choose",
        "collect",
        "datasets",
        "effects",
        "greedy",
        "group_effects",
        "measure",
        "ov",
        "pair_effects",
        "predictions",
        "qk",
        "residual",
        "scores",
        "shares",
        "tracing",
    ],
)
