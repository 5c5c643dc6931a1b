"""Check for control tokens, unknown characters and dropped characters."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..errors import InputError
from .segments import Segment

MARKUP = re.compile(r"<.+>|\[.+\]", re.DOTALL)
"""Pattern of control tokens that a tokenizer does not mark as special."""

BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
"""Token of one byte of a character that is not in the vocabulary."""

PRIVATE = "\ue000\ue001"
"""Private-use characters, which a vocabulary contains only as bytes."""

BROKEN = "\N{REPLACEMENT CHARACTER}"
"""Result of decoding an incomplete character."""

Token = tuple[int, int, int, Segment]
"""Token id, first character, end, and the segment that the token belongs to."""


class Characters:
    """Checks that a tokenizer reads every character of the prompts.

    Parameters
    ----------
    tokenizer
        A fast transformers tokenizer.
    control_tokens
        Whether texts and labels may contain control tokens.
    """

    def __init__(self, tokenizer: Any, control_tokens: bool) -> None:
        self.backend = tokenizer.backend_tokenizer
        self.control = {} if control_tokens else _control_tokens(tokenizer)
        self.unknown = _unknown_tokens(tokenizer)
        self.added = set(tokenizer.added_tokens_decoder)
        # BPE without an unknown token or byte tokens drops unknown characters. The unknown
        # token of transformers is not always known to the backend's model.
        model = self.backend.model
        self.silent = type(model).__name__ == "BPE" and model.unk_token is None
        self.known: dict[str, bool] = {}

    def check(self, number: int, string: str, tokens: Sequence[Token]) -> None:
        """Check that the tokenizer reads every character of a prompt.

        Parameters
        ----------
        number
            Number of the prompt, for the message.
        string
            The prompt.
        tokens
            Its tokens, without the special tokens that the tokenizer adds.

        Raises
        ------
        InputError
            If the tokenizer drops a character or does not know it, or a text, label or query
            contains a control token.
        """
        covered = np.zeros(len(string), dtype=bool)
        for token, start, end, segment in tokens:
            covered[start:end] = True
            if token not in self.unknown and token not in self.control:
                continue
            written = string[start:end].strip(" ")
            if token in self.unknown and written not in ("", self.unknown[token]):
                raise InputError(
                    f"prompt {number}: the tokenizer does not know {_named(written)} in "
                    f"{_shown(segment)} and reads its unknown token {self.unknown[token]!r} "
                    "instead; remove the text that contains it, or use another tokenizer"
                )
            if token in self.control and segment.role not in ("separator", "bos"):
                content = self.control[token]
                if BYTE.fullmatch(content) and written != content:
                    continue
                raise InputError(
                    f"prompt {number}: {_shown(segment)} contains {content!r}, which the tokenizer "
                    "reads as one of its control tokens; remove it, or pass "
                    "control_tokens=True if the model should see the control token"
                )
        if not covered.all():
            lost = self._lost(string, tokens)
            if lost:
                raise InputError(
                    f"prompt {number}: the tokenizer drops {_named(lost)}, so the model would not "
                    "see it; remove the text that contains it, or use another tokenizer"
                )

    def check_label(self, label: str, token: int) -> None:
        """Check that a label is known and not a control token."""
        if token in self.unknown and label != self.unknown[token]:
            raise InputError(f"the tokenizer does not know the label {label!r}; use another word")
        if token in self.control and not BYTE.fullmatch(self.control[token]):
            raise InputError(
                f"the label {label!r} is one of the tokenizer's control tokens; use another "
                "word, or pass control_tokens=True"
            )

    def _lost(self, string: str, tokens: Sequence[Token]) -> str:
        """Return the characters of a prompt that have no token.

        Offsets only show that such characters may exist: after a dropped character they are
        wrong, and they do not cover an accent that the normalizer joins with its letter.
        """
        normalizer = self.backend.normalizer
        lost, rest = "", string
        if normalizer is not None:
            taken_out = [c for c in dict.fromkeys(string) if not normalizer.normalize_str(c)]
            lost, rest = "".join(taken_out), normalizer.normalize_str(string)
        for text in {string[start:end] for token, start, end, _ in tokens if token in self.added}:
            rest = rest.replace(text, "")
        return lost + "".join(filter(self._has_no_token, dict.fromkeys(rest)))

    def _has_no_token(self, character: str) -> bool:
        if character not in self.known:
            found = _ids(self.backend, character)
            absent = not found
            if self.silent:
                unlike = next(c for c in PRIVATE if c != character)
                absent |= found == _ids(self.backend, unlike)
                absent |= character != BROKEN and BROKEN in self.backend.decode(found)
            self.known[character] = character.isspace() or not absent
        return not self.known[character]


def _control_tokens(tokenizer: Any) -> dict[int, str]:
    """Return the texts of a tokenizer's control tokens, by id.

    Added tokens of only spaces are ordinary text.
    """
    added = {key: token.content.strip() for key, token in tokenizer.added_tokens_decoder.items()}
    special = {key for key, token in tokenizer.added_tokens_decoder.items() if token.special}
    return {k: text for k, text in added.items() if text and (k in special or _is_markup(text))}


def _is_markup(text: str) -> bool:
    return MARKUP.fullmatch(text) is not None


def _unknown_tokens(tokenizer: Any) -> dict[int, str]:
    """Return the texts of the unknown tokens of the tokenizer and its model, by id."""
    model = tokenizer.backend_tokenizer.model
    found: dict[int, str] = {}
    names = [tokenizer.unk_token, getattr(model, "unk_token", None)]
    for name in names:
        key = tokenizer.backend_tokenizer.token_to_id(name) if name else None
        if key is not None:
            found[key] = name
    if type(model).__name__ == "Unigram":  # it does not name its unknown token
        first, second = (_ids(tokenizer.backend_tokenizer, c) for c in PRIVATE)
        if first and first == second:
            found[first[-1]] = tokenizer.convert_ids_to_tokens(first[-1])
    return found


def _ids(backend: Any, text: str) -> list[int]:
    ids: list[int] = backend.encode(text, add_special_tokens=False).ids
    return ids


def _named(characters: str) -> str:
    """List characters with their code points, each once."""
    listed = [f"{c!r} (U+{ord(c):04X})" for c in dict.fromkeys(characters)]
    return ", ".join(listed[:5]) + (" and others" if len(listed) > 5 else "")


def _shown(segment: Segment) -> str:
    """Describe a segment, for a message."""
    what = {name: f"the {name}" for name in ("query", "label", "text", "completion")}
    text = segment.text if len(segment.text) < 60 else f"{segment.text[:57]}..."
    return f"{what.get(segment.role, 'the template')} {text!r}"
