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
"""Short words to suggest if a label is more than one token."""

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


def label_token_ids(
    prompts: Sequence[Prompt],
    labels: Sequence[str],
    tokenizer: Any,
    base: Sequence[Sequence[int]],
    *,
    add_special_tokens: bool = True,
    control_tokens: bool = False,
) -> list[int]:
    """Return the token id of each label after the queries.

    Parameters
    ----------
    prompts
        The prompts. Each label is appended to each prompt, with the spaces before the label
        in the prompt's first demonstration. A prompt without demonstrations uses the spaces
        of the first prompt with demonstrations.
    labels
        Label texts.
    tokenizer, add_special_tokens, control_tokens
        As in `tokenize`.
    base
        Token ids of the prompts.

    Raises
    ------
    InputError
        If a label is not exactly one token after a prompt, if it is not the same token after
        every prompt, or if two labels are the same token.
    """
    gaps = [_gap(prompt) for prompt in prompts]
    usual = next((gap for gap in gaps if gap is not None), " ")
    starts = [p.string + (usual if g is None else g) for p, g in zip(prompts, gaps, strict=True)]
    characters = Characters(tokenizer, control_tokens)
    ids: dict[int, str] = {}
    for label in labels:
        coded = encode([start + label for start in starts], tokenizer, add_special_tokens)
        for number, (whole, before) in enumerate(zip(coded, base, strict=True)):
            tail = whole[len(before) :]
            if whole[: len(before)] != list(before):
                raise InputError(
                    f"prompt {number}: with the label {label!r} after it the query "
                    f"{prompts[number].string[-20:]!r} is tokenized differently, so its last "
                    "position would not predict the label; use a template whose text before the "
                    "label ends in a separate token, as in '{text}: {label}\\n'"
                )
            if len(tail) != 1:
                pieces = ", ".join(map(repr, tokenizer.convert_ids_to_tokens(tail)))
                good = _suggest(starts[number], len(before), labels, tokenizer, add_special_tokens)
                raise InputError(
                    f"{f'prompt {number}: ' if number else ''}the label {label!r} is not one token "
                    f"for this tokenizer but {len(tail)} ({pieces}); a label must be one token. "
                    f"{good}"
                )
            if tail[0] != coded[0][-1]:
                there, first = tokenizer.convert_ids_to_tokens([tail[0], coded[0][-1]])
                raise InputError(
                    f"prompt {number}: the label {label!r} would be the token {there!r} here and "
                    f"is {first!r} after prompt 0; write the same characters before the labels "
                    "in every prompt"
                )
        token = coded[0][-1]
        characters.check_label(label, token)
        if token in ids:
            raise InputError(
                f"the labels {ids[token]!r} and {label!r} are the same token; labels must differ"
            )
        ids[token] = label
    return list(ids)


def check_label_positions(
    tokens: Sequence[Sequence[tuple[int, str, Segment]]], ids: dict[str, int], tokenizer: Any
) -> None:
    """Check that each demonstration's label is the same token as after the query."""
    for number, prompt in enumerate(tokens):
        found: dict[int, list[int]] = {}
        labels = {s.demonstration: s.label for _, _, s in prompt if s.demonstration >= 0}
        for token, role, segment in prompt:
            if role == "label":
                found.setdefault(segment.demonstration, []).append(token)
        for demonstration, label in labels.items():
            if found.get(demonstration) != [ids[label]]:
                pieces = tokenizer.convert_ids_to_tokens(found.get(demonstration, []))
                raise InputError(
                    f"prompt {number}, demonstration {demonstration}: the label {label!r} is "
                    f"tokenized as {pieces}, not as the single token after the query; put a "
                    "separator between text and label that the tokenizer does not merge, as in "
                    "'{text}: {label}\\n'"
                )


def _gap(prompt: Prompt) -> str | None:
    """Return the spaces before the label in the first demonstration; None without one.

    A user's label span may include them.
    """
    for before, segment in zip(prompt.segments, prompt.segments[1:], strict=False):
        if segment.role == "label":
            start = before.text[len(before.text.rstrip(" ")) :]
            return start + segment.text[: len(segment.text) - len(segment.text.lstrip(" "))]
    return None


def _suggest(
    start: str, length: int, labels: Sequence[str], tokenizer: Any, add_special_tokens: bool
) -> str:
    words = [word for word in CANDIDATE_LABELS if word not in labels]
    coded = encode([start + word for word in words], tokenizer, add_special_tokens)
    good = [word for word, ids in zip(words, coded, strict=True) if len(ids) == length + 1]
    return f"These are one token: {', '.join(good[:8])}" if good else "Try shorter words"
