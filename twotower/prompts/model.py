"""What prompts need of a model, as a protocol: the room of models lies above this one."""

from __future__ import annotations

from typing import Any, Protocol


class LoadedModel(Protocol):
    """A model with its tokenizer, such as `twotower.Model`."""

    @property
    def name(self) -> str:
        """Name for messages."""

    @property
    def tokenizer(self) -> Any:
        """A fast transformers tokenizer."""

    @property
    def max_positions(self) -> int | None:
        """Most tokens of a prompt."""

    @property
    def module(self) -> Any:
        """The transformers model."""

    @property
    def config(self) -> Any:
        """Its configuration."""

    @property
    def architecture(self) -> Any:
        """The adapter that names its parts."""
