"""Checks of a kind of model, on a small random one made from its configuration."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .check import check_model, prompt_lengths
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

    module, longest = small_module(config)
    architecture = find_architecture(module.config, module)
    tokenizer = tokenizer or synthetic_tokenizer(VOCABULARY)
    name = f"a small random {type(module).__name__}"
    model = Model(traced(module, tokenizer), tokenizer, architecture, name)
    return model, longest


def small_module(config: Any) -> tuple[Any, int]:
    """Return the transformers model of `small_model`, and its longest length."""
    config = language_config(config)
    check_not_refused(config)
    lengths = shortened(named_lengths(config))
    small = shrunk(config, lengths, VOCABULARY)
    if getattr(small, "vocab_size", VOCABULARY) < VOCABULARY:  # of a model that is small itself
        small.vocab_size = VOCABULARY
    module = random_small_model(small)
    return module, max(lengths.values(), default=0)


def check_small(model: Model, longest: int) -> dict[str, Finding]:
    """Check a small model on prompts longer than each of its lengths.

    Raises
    ------
    CheckError
        If an identity does not hold.
    """
    return check_model(model, prompt_lengths(longest))
