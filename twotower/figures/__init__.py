"""Views of a run: figures, tables in the terminal, and a report for the browser."""

import lazy_loader as _lazy

__getattr__, __dir__, __all__ = _lazy.attach_stub(__name__, __file__)
