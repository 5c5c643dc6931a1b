"""Checks of plain arguments, so that a wrong one is named where it is given."""

from __future__ import annotations

import math
from numbers import Integral, Rational, Real
from typing import Any

from .errors import InputError

MOST_PROMPTS = 1_000_000
"""More are a slip: no machine holds them, and drawing them alone takes hours."""


def check_is(value: Any, kind: str, name: str) -> None:
    """Refuse what is not a `Model`, `Prompts` or `Task`.

    Told by the class's name, since the classes are above this module.
    """
    if kind not in (cls.__name__ for cls in type(value).__mro__):
        made_by = {"Model": "load", "Prompts": "build_prompts", "Task": "load_task"}[kind]
        raise InputError(
            f"{name} must be what {made_by} returns (a {kind}); this is a {type(value).__name__}"
        )


def check_measured(model: Any, prompts: Any) -> None:
    """Refuse other things than a model and prompts, one or more, of two labels or more.

    Prompts made with another tokenizer than the model's are refused too.
    """
    check_is(model, "Model", "model")
    check_is(prompts, "Prompts", "prompts")
    if not len(prompts):
        raise InputError("there are no prompts")
    if len(prompts.labels) < 2:
        raise InputError(f"there is one label, {prompts.labels[0]!r}: nothing to tell it from")
    prompts.check_model(model)


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
    ok = isinstance(value, Integral) and not isinstance(value, bool)
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
    # A fraction is a real number to Python, but no tensor can be multiplied by one.
    ok = isinstance(value, Real) and not isinstance(value, bool)
    ok &= isinstance(value, Integral) or not isinstance(value, Rational)
    try:
        number = float(value) if ok else math.nan
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        shown = repr(value) if len(repr(value)) < 50 else f"{repr(value)[:50]}..."
        raise InputError(f"{name}={shown} must be a finite number")
    return number


def encodable(name: str, text: str) -> None:
    """Refuse a text that no tokenizer and no file takes.

    Parameters
    ----------
    name
        What the text is, for the message.
    text
        The text.

    Raises
    ------
    InputError
        If it holds half of a surrogate pair, as wrongly decoded bytes and JSON escapes do.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        half = text[error.start]
        raise InputError(
            f"{name} {_short(text)} holds U+{ord(half):04X}, half of a surrogate pair and no "
            "character by itself; read the text again with the right encoding, or leave it out"
        ) from None


def _short(text: str) -> str:
    return repr(text if len(text) < 60 else f"{text[:57]}...")


def yes_or_no(name: str, value: Any) -> None:
    """Refuse what is not True or False.

    Raises
    ------
    InputError
        With the argument's name.
    """
    import numpy as np  # here, since it takes a while and the command line does without

    if not isinstance(value, (bool, np.bool_)):
        raise InputError(f"{name}={value!r} must be True or False")
