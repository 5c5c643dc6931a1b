"""Convert segments to tokens with roles, by the tokenizer's character offsets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..errors import InputError
from .characters import Characters, Token
from .segments import Prompt, Segment

CANDIDATE_LABELS = (
    "foo bar map key cup dog sun red box car one two yes no hat pen ice oak gem fox "
    "win jam log net owl pie rug tin van wax"
).split()
"""Short words that are labels by default; most tokenizers have them as one token."""

AT_ONCE = 1024
"""Strings per call of the tokenizer; limits memory for long lists."""


def encode(
    strings: Sequence[str], tokenizer: Any, add_special_tokens: bool = True
) -> list[list[int]]:
    """Return the token ids of each string."""
    found: list[list[int]] = []
    for start in range(0, len(strings), AT_ONCE):
        some = list(strings[start : start + AT_ONCE])
        found += tokenizer(some, add_special_tokens=add_special_tokens)["input_ids"]
    return found


def tokenize(
    prompts: Sequence[Prompt],
    tokenizer: Any,
    *,
    add_special_tokens: bool = True,
    control_tokens: bool = False,
) -> list[list[tuple[int, str, Segment]]]:
    """Return the tokens of every prompt as (token id, role, segment).

    The last token has the role "last"; special tokens at the start have the role "bos". A token
    that spans two segments (such as a text's last letters and the colon) belongs to the segment
    of its last character.

    Parameters
    ----------
    prompts, tokenizer
        The prompts and their tokenizer.
    add_special_tokens
        Whether the tokenizer adds its special tokens. If not, a BOS token written at the start
        has the role "bos".
    control_tokens
        Whether texts and labels may contain control tokens.

    Raises
    ------
    InputError
        If the tokenizer adds a special token at the end, a prompt is empty, a prompt contains
        the BOS token that the tokenizer also adds, or the tokenizer drops or does not know a
        character.
    """
    strings = [p.string for p in prompts]
    coded = tokenizer(
        strings,
        add_special_tokens=add_special_tokens,
        return_offsets_mapping=True,
        return_special_tokens_mask=True,
    )
    characters = Characters(tokenizer, control_tokens)
    answer = []
    for number, prompt in enumerate(prompts):
        ends = np.cumsum([len(s.text) for s in prompt.segments])
        tokens: list[tuple[int, str, Segment]] = []
        written: list[Token] = []
        for token, (start, end), special in zip(
            coded["input_ids"][number],
            coded["offset_mapping"][number],
            coded["special_tokens_mask"][number],
            strict=True,
        ):
            if special and end <= start:
                tokens.append((token, "bos", Segment("", "bos")))
                continue
            # A token without characters (SentencePiece's word-start mark) belongs to the next
            # character.
            last = max(end - 1, start)
            place = min(int(np.searchsorted(ends, last, side="right")), len(ends) - 1)
            segment = prompt.segments[place]
            first = not tokens and not add_special_tokens and segment.role == "separator"
            if first and token == tokenizer.bos_token_id:
                segment = Segment("", "bos")
            tokens.append((token, segment.role, segment))
            written.append((token, start, end, segment))
        if not written or tokens[-1][1] == "bos":
            raise InputError(
                f"the tokenizer ends prompt {number} with a special token, so its last position "
                "would not predict the label; pass a tokenizer that adds none at the end, or "
                "add_special_tokens=False"
            )
        added = {token for token, role, _ in tokens[: len(tokens) - len(written)] if role == "bos"}
        if written[0][0] in added:
            begins = tokenizer.convert_ids_to_tokens(written[0][0])
            raise InputError(
                f"prompt {number} begins with {begins!r}, which the tokenizer also adds to every "
                "prompt; remove it from the instruction, template or string, or pass "
                "add_special_tokens=False"
            )
        characters.check(number, strings[number], written)
        token, _, segment = tokens[-1]
        tokens[-1] = (token, "last", segment)
        answer.append(tokens)
    return answer
