"""What a run looks like: figures, tables in the terminal, and a report for the browser."""

import lazy_loader as _lazy

__getattr__, __dir__, __all__ = _lazy.attach(
    __name__,
    submod_attrs={
        "curves": ["bias_curves", "knocked_out"],
        "heads": ["effect_by_layer", "head_map", "two_towers"],
        "positions": ["attention", "label_logits"],
        "report": ["write_report"],
        "views": ["PromptView", "head_table", "prompt_view"],
    },
)
