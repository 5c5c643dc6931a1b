"""Protocol of the models that prompts accept; this package must not import `models`."""

from __future__ import annotations

from typing import Any, Protocol


class LoadedModel(Protocol):
    """A model with its tokenizer, such as `twotower.Model`."""

    @property
    def name(self) -> str:
        """Name, for messages."""

    @property
    def tokenizer(self) -> Any:
        """A fast transformers tokenizer."""

    @property
    def max_positions(self) -> int | None:
        """Largest number of tokens in a prompt; None for no limit."""

    @property
    def module(self) -> Any:
        """The transformers model."""

    @property
    def config(self) -> Any:
        """The transformers configuration."""

    @property
    def architecture(self) -> Any:
        """The architecture adapter."""
