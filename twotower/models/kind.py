"""Checks of a kind of model, on a small random one made from its configuration."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .check import SHORT, check_model
from .length_settings import named_lengths, shortened
from .random_weights import synthetic_tokenizer
from .registry import check_not_refused, find_architecture, language_config
from .shrink import random_small_model, shrunk

if TYPE_CHECKING:
    from ..results.findings import Finding
    from .model import Model

VOCABULARY = 1024
"""Size of the small model's vocabulary."""


def small_model(config: Any, tokenizer: Any = None) -> tuple[Model, int]:
    """Return a small random model of a configuration's kind, and its longest length.

    Lengths at which attention changes, such as windows, are shortened.

    Parameters
    ----------
    config
        A transformers configuration.
    tokenizer
        The model's tokenizer; by default a synthetic one.

    Returns
    -------
    tuple
        The model, and the longest of its lengths in tokens; 0 without
        lengths.

    Raises
    ------
    ModelError
        If no adapter fits, or no such model can be made.
    """
    from .model import Model
    from .traced import traced

    config = language_config(config)
    check_not_refused(config)
    lengths = shortened(named_lengths(config))
    module = random_small_model(shrunk(config, lengths, VOCABULARY))
    architecture = find_architecture(module.config, module)
    tokenizer = tokenizer or synthetic_tokenizer(VOCABULARY)
    name = f"a small random {type(module).__name__}"
    model = Model(traced(module, tokenizer), tokenizer, architecture, name)
    return model, max(lengths.values(), default=0)


def check_small(model: Model, longest: int) -> dict[str, Finding]:
    """Check a small model on prompts longer than each of its lengths.

    Raises
    ------
    CheckError
        If an identity does not hold.
    """
    return check_model(model, (2 * longest + 5, longest + 2) if longest else SHORT)
