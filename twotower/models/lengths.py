"""Check attention beyond the lengths at which it changes.

Attention may have a window, chunks, or a context length beyond which rotary embeddings or queries
are scaled. Short prompts do not reach these. If the configuration names such a length, the check
runs on longer prompts: in the model itself if the length is short, else in a small random model of
the same kind with shorter lengths.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

from ..errors import CheckError, TwoTowerWarning
from .check import check_model, prompt_lengths
from .length_settings import named_lengths

if TYPE_CHECKING:
    from ..results.findings import Finding
    from .model import Model

AFFORDABLE = 64
"""Longest length, in positions, that is checked in the model itself."""


def check_lengths(model: Model) -> dict[str, Finding]:
    """Check attention beyond every length in a model's configuration.

    Parameters
    ----------
    model
        A loaded model.

    Returns
    -------
    dict
        As from `check_model`; empty if the configuration names no length.

    Raises
    ------
    CheckError
        If the adapter does not describe attention beyond a length.
    """
    lengths = named_lengths(model.config)
    if not lengths:
        return {}
    longest = max(lengths.values())
    if longest <= AFFORDABLE and not model.quantization and not model.remote:
        return _beyond(model, model, longest, lengths)
    small = _small(model)
    return {} if small is None else _beyond(model, *small, lengths)


def _small(model: Model) -> tuple[Model, int] | None:
    """Make a small model of the kind, with shorter lengths; None with a warning if that fails."""
    from .kind import small_model

    try:
        small, longest = small_model(model.config, model.tokenizer)
    except Exception as error:  # any error of the model's code about sizes
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        warnings.warn(
            f"{model.name}: attention beyond its first lengths was not checked, because no small "
            f"model of its kind could be made ({reason})",
            TwoTowerWarning,
            stacklevel=2,
        )
        return None
    return small, longest


def _beyond(
    model: Model, proved: Model, longest: int, lengths: dict[str, int]
) -> dict[str, Finding]:
    """Run the check on prompts slightly longer than the longest length and than twice of it."""
    try:
        return check_model(proved, prompt_lengths(longest))
    except CheckError as error:
        named = ", ".join(f"{name}={value}" for name, value in lengths.items())
        raise CheckError(
            f"{model.name} changes its attention at a length that the adapter "
            f"{type(model.architecture).__name__} does not describe ({named}): {error}"
        ) from error
