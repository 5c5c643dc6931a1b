"""Measures: (model, prompts) to labelled datasets. One file for each group of the schema.

Modules are imported when they are first used: those that only read datasets need no torch.
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
