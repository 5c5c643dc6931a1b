"""Options of all measures, set globally or for a with-block."""

from __future__ import annotations

from types import TracebackType
from typing import Any, TypedDict, Unpack, cast

from .checks import positive_bytes, whole, yes_or_no
from .errors import InputError


class Options(TypedDict, total=False):
    """Names and types of the options."""

    batch_size: int | None
    memory_budget: int | str | None
    progress: bool | str
    proof: bool


_OPTIONS: Options = {"batch_size": None, "memory_budget": None, "progress": False, "proof": True}


def option(name: str) -> Any:
    """Return the value of an option."""
    return _OPTIONS[name]  # type: ignore[literal-required]


class set_options:
    """Set options from now on, or for a with-block.

    Parameters
    ----------
    batch_size
        Prompts in a batch, fewer if memory runs out. By default (None) the size is found
        automatically: about a thousand tokens on a CPU, as many as fit on a GPU. It is
        remembered for each measure.
    memory_budget
        Memory that a batch of a sweep may use beyond the weights, in bytes or as a text such
        as "2GiB". By default (None) half of the free memory. Counterfactual rows pass through
        the layers in chunks that fit.
    progress
        True shows a bar for every measure; a text sets the bar's title. False by default.
    proof
        Whether to check the identities behind the numbers in every batch, and to compare every
        state of a model once with an independent forward. The attribute `proof` of every
        dataset records the outcome, or that no proof was made. True by default.

    Raises
    ------
    InputError
        If an option does not exist, or its value is invalid.

    Examples
    --------
    >>> with set_options(batch_size=4, progress=True):
    ...     pass
    """

    def __init__(self, **options: Unpack[Options]) -> None:
        for name, value in options.items():
            if name not in _OPTIONS:
                raise InputError(f"{name}= is not an option; options are {', '.join(_OPTIONS)}")
            _CHECKS[name](name, value)
        before = {name: option(name) for name in options}
        self._before = cast(Options, before)
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


def _batch_size(name: str, value: Any) -> None:
    if value is not None:
        whole(name, value, 1)


def _memory_budget(name: str, value: Any) -> None:
    if value is not None:
        positive_bytes(name, value)


def _progress(name: str, value: Any) -> None:
    if not isinstance(value, str):
        yes_or_no(name, value)


_CHECKS = {
    "batch_size": _batch_size,
    "memory_budget": _memory_budget,
    "progress": _progress,
    "proof": yes_or_no,
}
