"""Checks of simple arguments; the error names the wrong argument."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from numbers import Integral, Rational, Real
from pathlib import Path
from typing import Any

from .errors import InputError

MOST_PROMPTS = 1_000_000
"""Largest number of prompts accepted. More is a mistake: drawing them would take hours, and no
machine holds them."""


def check_is(value: Any, kind: str, name: str) -> None:
    """Check that a value is a `Model`, `Prompts` or `Task`.

    Compares class names, because this low-level module cannot import the classes.
    """
    if kind not in (cls.__name__ for cls in type(value).__mro__):
        made_by = {"Model": "load", "Prompts": "build_prompts", "Task": "load_task"}[kind]
        raise InputError(
            f"{name} must be the result of {made_by} (a {kind}); this is a {type(value).__name__}"
        )


def check_measured(model: Any, prompts: Any) -> None:
    """Check that a model and prompts can be measured.

    There must be at least one prompt and two labels, and the prompts must be made with the
    model's tokenizer.
    """
    check_is(model, "Model", "model")
    check_is(prompts, "Prompts", "prompts")
    if not len(prompts):
        raise InputError("there are no prompts")
    if len(prompts.labels) < 2 and not prompts.answers.by_prompt:
        raise InputError(f"there is only one label, {prompts.labels[0]!r}; give two or more")
    prompts.check_model(model)


def whole(name: str, value: Any, least: int = 0, most: int | None = None) -> int:
    """Return a value after checking that it is a whole number within bounds.

    Parameters
    ----------
    name
        Name of the argument, for the message.
    value
        Value to check.
    least, most
        Bounds, inclusive.

    Raises
    ------
    InputError
        If the value is not a whole number (nor are True and False), or out of bounds.
    """
    ok = isinstance(value, Integral) and not isinstance(value, bool)
    if not ok or value < least or (most is not None and value > most):
        bounds = f"{least} or more" if most is None else f"from {least} to {most}"
        raise InputError(f"{name}={shown(value)} must be a whole number, {bounds}")
    return int(value)


def finite(name: str, value: Any) -> float:
    """Return a value as a float after checking that it is a finite number.

    Raises
    ------
    InputError
        If it is not a finite number.
    """
    # Python counts a fraction as a real number, but no tensor can be multiplied by it.
    ok = isinstance(value, Real) and not isinstance(value, bool)
    ok &= isinstance(value, Integral) or not isinstance(value, Rational)
    try:
        number = float(value) if ok else math.nan
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise InputError(f"{name}={shown(value)} must be a finite number")
    return number


def fraction(name: str, value: Any) -> float:
    """Return a value after checking that it is a number from 0 to 1.

    Raises
    ------
    InputError
        If it is not.
    """
    number = finite(name, value)
    if not 0 <= number <= 1:
        raise InputError(f"{name}={shown(value)} must be a number from 0 to 1")
    return number


def encodable(name: str, text: str) -> None:
    """Check that a text can be tokenized and written to a file as UTF-8.

    Parameters
    ----------
    name
        Name of the text, for the message.
    text
        Text to check.

    Raises
    ------
    InputError
        If the text holds half of a surrogate pair, a result of wrongly decoded bytes or JSON
        escapes.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        half = text[error.start]
        raise InputError(
            f"{name} {shown(text)} holds U+{ord(half):04X}, half of a surrogate pair, which is "
            "not a character; read the text again with the right encoding, or leave it out"
        ) from None


def shown(value: Any) -> str:
    """Return a value as it is shown in a message: in one short line."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else f"{text[:57]}..."


def is_list(value: Any, sized: bool = False) -> bool:
    """Return whether a value can be iterated over, and perhaps counted, and is no text.

    It is tried, because arrays without dims have the methods of lists, which raise.
    """
    if isinstance(value, (str, bytes)):
        return False
    try:
        iter(value)
        return not sized or len(value) >= 0
    except TypeError:
        return False


def several(name: str, value: Any) -> list[Any]:
    """Return the items of a list or another collection, which is not a text.

    Raises
    ------
    InputError
        If the value is something else; the message names the argument.
    """
    if isinstance(value, Mapping) or not is_list(value):
        raise InputError(f"{name}={shown(value)} must be a list")
    return list(value)


def one_of(name: str, value: Any, known: Iterable[str]) -> None:
    """Check that a text is one of the known ones.

    Raises
    ------
    InputError
        If it is not; the message lists the known ones.
    """
    known = tuple(known)
    if not isinstance(value, str) or value not in known:
        raise InputError(f"{name}={shown(value)} is not known; use one of {', '.join(known)}")


def yes_or_no(name: str, value: Any) -> None:
    """Check that a value is True or False.

    Raises
    ------
    InputError
        If it is not; the message names the argument.
    """
    import numpy as np  # slow to import, and the command line does not need it

    if not isinstance(value, (bool, np.bool_)):
        raise InputError(f"{name}={shown(value)} must be True or False")


def writable_file(path: str | Path) -> Path:
    """Return the path of a file to write, after checking that its folder is there.

    Raises
    ------
    InputError
        If it is a folder, or its folder is not there.
    """
    target = Path(path).expanduser()
    try:
        if "\0" in str(target):
            raise InputError(f"path={str(path)!r} must be a path")
        nowhere = target.is_dir() or not target.parent.is_dir()
    except OSError as error:  # for example, a name that is too long
        raise InputError(f"{target} cannot be written: {error.strerror}") from error
    if nowhere:
        raise InputError(f"{target} cannot be written: it is a folder, or its folder is not there")
    return target


def positive_bytes(name: str, value: Any) -> int:
    """Return a number of bytes, given as a whole number or as a text such as "2GiB".

    Raises
    ------
    InputError
        If it is not a positive number of bytes.
    """
    from accelerate.utils.modeling import convert_file_size_to_int

    wrong = InputError(f"{name}={shown(value)} must be a number of bytes, or like '2GiB'")
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        raise wrong
    try:
        plain = str(value).isdigit()
        found = int(value) if plain else int(convert_file_size_to_int(value))
    except (ValueError, OverflowError):
        raise wrong from None
    if found <= 0:
        raise wrong
    return found
