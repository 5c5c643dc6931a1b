"""Texts of single tokens."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


def token_text(tokenizer: Any, token: int) -> str:
    """Return the text of a token in the middle of a text, "" for a negative id.

    Some decoders leave out a space at the beginning of a text, such as Llama 2's. So the token is
    decoded twice in a row, and the second text is taken.
    """
    if token < 0:
        return ""
    once, twice = (
        tokenizer.decode([int(token)] * n, clean_up_tokenization_spaces=False) for n in (1, 2)
    )
    return str(twice.removeprefix(once) if twice.startswith(once) else once)


def token_texts(tokenizer: Any, tokens: Iterable[int]) -> list[str]:
    """Return the texts of tokens in the middle of a text."""
    listed = [int(token) for token in tokens]
    known = {token: token_text(tokenizer, token) for token in set(listed)}
    return [known[token] for token in listed]
