"""What a tokenizer makes of single characters: control tokens, unknown ones, none at all."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..errors import InputError
from .segments import Segment

MARKUP = re.compile(r"<.+>|\[.+\]", re.DOTALL)
"""How control tokens look that a tokenizer does not mark as special."""

BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
"""A byte of a character that the vocabulary lacks."""

PRIVATE = "\ue000\ue001"
"""Characters without a meaning, which no vocabulary holds but as bytes."""

BROKEN = "\N{REPLACEMENT CHARACTER}"
"""What some of a character's bytes are decoded to."""

Token = tuple[int, int, int, Segment]
"""Token id, first character, end, and the segment that the token belongs to."""


class Characters:
    """Checks that the characters of prompts are read as they are written.

    Parameters
    ----------
    tokenizer
        A fast transformers tokenizer.
    control_tokens
        Whether control tokens may stand in texts and labels.
    """

    def __init__(self, tokenizer: Any, control_tokens: bool) -> None:
        self.backend = tokenizer.backend_tokenizer
        self.control = {} if control_tokens else _control_tokens(tokenizer)
        self.unknown = _unknown_tokens(tokenizer)
        self.added = set(tokenizer.added_tokens_decoder)
        # BPE without a token for unknown characters, or bytes of them, leaves them out. What
        # transformers calls the unknown token is not always one of the vocabulary's model.
        model = self.backend.model
        self.silent = type(model).__name__ == "BPE" and model.unk_token is None
        self.known: dict[str, bool] = {}

    def check(self, number: int, string: str, tokens: Sequence[Token]) -> None:
        """Refuse a prompt whose characters are not read as they are written.

        Parameters
        ----------
        number
            Number of the prompt, for the message.
        string
            The prompt.
        tokens
            Its tokens, without those that the tokenizer adds by itself.

        Raises
        ------
        InputError
            If the tokenizer drops a character or does not know it, or a control token
            stands in a text, label or query.
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
                    "instead; leave out the text that holds it, or take another tokenizer"
                )
            if token in self.control and segment.role not in ("separator", "bos"):
                content = self.control[token]
                if BYTE.fullmatch(content) and written != content:
                    continue
                raise InputError(
                    f"prompt {number}: {_shown(segment)} holds {content!r}, which the tokenizer "
                    "reads as one of its control tokens; leave it out, or pass "
                    "control_tokens=True if the model shall see the control token"
                )
        if not covered.all():
            lost = self._lost(string, tokens)
            if lost:
                raise InputError(
                    f"prompt {number}: the tokenizer drops {_named(lost)}, so the model would not "
                    "see it; leave out the text that holds it, or take another tokenizer"
                )

    def check_label(self, label: str, token: int) -> None:
        """Refuse a label that is a control token or unknown."""
        if token in self.unknown and label != self.unknown[token]:
            raise InputError(f"the tokenizer does not know the label {label!r}; take another word")
        if token in self.control and not BYTE.fullmatch(self.control[token]):
            raise InputError(
                f"the label {label!r} is one of the tokenizer's control tokens; take another "
                "word, or pass control_tokens=True"
            )

    def _lost(self, string: str, tokens: Sequence[Token]) -> str:
        """Characters of a prompt that no token stands for.

        Offsets only say that there are some: where one is dropped, those after it are off, and
        an accent that the normalizer joins with its letter is covered by none.
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
    """Texts of a tokenizer's control tokens by id.

    Runs of blanks, which some tokenizers add too, are text like any other.
    """
    added = {key: token.content.strip() for key, token in tokenizer.added_tokens_decoder.items()}
    special = {key for key, token in tokenizer.added_tokens_decoder.items() if token.special}
    return {k: text for k, text in added.items() if text and (k in special or _is_markup(text))}


def _is_markup(text: str) -> bool:
    return MARKUP.fullmatch(text) is not None


def _unknown_tokens(tokenizer: Any) -> dict[int, str]:
    """Texts of the tokens for unknown characters by id, as tokenizer and vocabulary name them."""
    model = tokenizer.backend_tokenizer.model
    found: dict[int, str] = {}
    names = [tokenizer.unk_token, getattr(model, "unk_token", None)]
    for name in names:
        key = tokenizer.backend_tokenizer.token_to_id(name) if name else None
        if key is not None:
            found[key] = name
    if type(model).__name__ == "Unigram":  # it does not say which its unknown token is
        first, second = (_ids(tokenizer.backend_tokenizer, c) for c in PRIVATE)
        if first and first == second:
            found[first[-1]] = tokenizer.convert_ids_to_tokens(first[-1])
    return found


def _ids(backend: Any, text: str) -> list[int]:
    ids: list[int] = backend.encode(text, add_special_tokens=False).ids
    return ids


def _named(characters: str) -> str:
    """Characters with their code points, each once."""
    listed = [f"{c!r} (U+{ord(c):04X})" for c in dict.fromkeys(characters)]
    return ", ".join(listed[:5]) + (" and others" if len(listed) > 5 else "")


def _shown(segment: Segment) -> str:
    """A segment, for a message."""
    what = {"query": "the query", "label": "the label", "text": "the text"}.get(segment.role, "")
    text = segment.text if len(segment.text) < 60 else f"{segment.text[:57]}..."
    return f"{what or 'the template'} {text!r}"
