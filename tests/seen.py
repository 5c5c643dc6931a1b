"""A plugin of coverage, which lets it see what follows a trace.

nnsight's `__exit__` is entered with tracing off, since the body was left by an exception of the
trace function, and turns it on again. Coverage is then told that `__exit__` returns but was not
told of its call: from there on, it takes every line for one of the calling function's file.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from wrapt import when_imported


def balanced(leave: Callable[..., bool]) -> Callable[..., bool]:
    """An `__exit__` with coverage on from its beginning, and told of the call of this function."""

    def __exit__(self: Any, kind: Any, error: Any, traceback: Any) -> bool:
        displaced = getattr(error, "displaced", None)
        if displaced is not None and sys.gettrace() is None:
            sys.settrace(displaced)
            displaced(sys._getframe(), "call", None)
        return leave(self, kind, error, traceback)

    return __exit__


def balance(tracer: Any) -> None:
    """Change both classes that have an `__exit__` of their own."""
    for cls in (tracer.Tracer, tracer.InterleavingTracer):
        cls.__exit__ = balanced(cls.__exit__)


def coverage_init(registry: Any, options: Any) -> None:
    """Called by coverage in every process that it begins in."""
    when_imported("nnsight.intervention.tracer")(balance)
