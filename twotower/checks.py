"""Checks of plain arguments, so that a wrong one is named where it is given."""

from __future__ import annotations

from typing import Any

import numpy as np

from .errors import InputError


def whole(name: str, value: Any, least: int = 0, most: int | None = None) -> int:
    """A whole number within bounds.

    Parameters
    ----------
    name
        Name of the argument, for the message.
    value
        What was given.
    least, most
        Bounds, both allowed.

    Raises
    ------
    InputError
        If it is no whole number (True and False are none), or out of bounds.
    """
    ok = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
    if not ok or value < least or (most is not None and value > most):
        bounds = f"{least} or more" if most is None else f"from {least} to {most}"
        raise InputError(f"{name}={value!r} must be a whole number, {bounds}")
    return int(value)


def finite(name: str, value: Any) -> float:
    """A finite number.

    Raises
    ------
    InputError
        If it is none.
    """
    ok = isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)
    if not ok or not np.isfinite(value):
        raise InputError(f"{name}={value!r} must be a finite number")
    return float(value)
