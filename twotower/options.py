"""Options that hold for all measures, until they are set again or for a with-block."""

from __future__ import annotations

from types import TracebackType
from typing import Any

from .checks import yes_or_no
from .errors import InputError

_OPTIONS: dict[str, Any] = {"proof": True}


def option(name: str) -> Any:
    """The value of an option."""
    return _OPTIONS[name]


class set_options:
    """Set options, for good or for a with-block.

    Parameters
    ----------
    proof
        Whether every batch proves the identities that its numbers rest on, and every state of a
        model is measured once more by a forward of its own. What was found, or that it was not
        looked for, stands in every dataset's attribute `proof`. On by default.

    Raises
    ------
    InputError
        If there is no such option, or it cannot have this value.

    Examples
    --------
    >>> with set_options(proof=False):
    ...     pass
    """

    def __init__(self, **options: Any) -> None:
        for name, value in options.items():
            if name not in _OPTIONS:
                raise InputError(f"{name}= is not an option; options are {', '.join(_OPTIONS)}")
            yes_or_no(name, value)
        self._before = {name: _OPTIONS[name] for name in options}
        _OPTIONS.update(options)

    def __enter__(self) -> None:
        return None

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        _OPTIONS.update(self._before)
