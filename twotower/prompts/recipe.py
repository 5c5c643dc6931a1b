"""Protocol of the settings from which prompts were made."""

from __future__ import annotations

from typing import Any, Protocol


class Recipe(Protocol):
    """All settings of a set of prompts, except their number and the tokenizer."""

    def describe(self) -> dict[str, Any]:
        """Return the arguments of `build_prompts`, for the provenance."""

    def split(
        self, fraction: float, seed: int, n_first: int, n_second: int, tokenizer: Any
    ) -> tuple[Any, Any]:
        """Make prompts from two parts of the task's texts."""
