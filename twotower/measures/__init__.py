"""Measures: (model, prompts) to labelled datasets. One file for each group of the schema.

Modules are imported when they are first used: those that only read datasets need no torch.
The stub beside this module lists them, for this and for type checkers.
"""

import lazy_loader as _lazy

__getattr__, __dir__, __all__ = _lazy.attach_stub(__name__, __file__)
