"""Properties that are computed once, of objects that are sent to servers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

T = TypeVar("T")


def once(function: Callable[[Any], T]) -> T:
    """Return a property that is computed at first access and then stored.

    `functools.cached_property` holds a lock, which cannot be sent to a server.
    """
    name = f"_{function.__name__}"

    def read(self: Any) -> T:
        if name not in self.__dict__:
            self.__dict__[name] = function(self)
        return cast(T, self.__dict__[name])

    # Type checkers see an attribute of the returned type.
    return cast(T, property(read, doc=function.__doc__))
