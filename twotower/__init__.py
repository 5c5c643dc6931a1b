"""Find, measure and explain the attention heads by which language models learn in context.

Names are imported when they are first used, so that importing the package is quick.
The stub beside this module lists them, for this and for type checkers.
"""

from types import ModuleType as _ModuleType

import lazy_loader as _lazy
import wrapt as _wrapt

# nnsight gives every object a method `save`, modules included, which would hide a name
# that is looked up lazily; so these two are here from the start.
from .results import open as open
from .results import save as save

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = _lazy.attach_stub(__name__, __file__)
__all__ += ["__version__"]


@_wrapt.when_imported("xarray")
def _register_accessors(_module: _ModuleType) -> None:
    """Give datasets and runs their `.tt`; xarray is imported when it is first needed."""
    from . import accessor as accessor  # registers itself
