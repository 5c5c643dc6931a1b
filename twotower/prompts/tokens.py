"""From segments to tokens with roles, through the tokenizer's character offsets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..errors import InputError
from .segments import Prompt, Segment

CANDIDATE_LABELS = (
    "foo bar map key cup dog sun red box car one two yes no hat pen ice oak gem fox "
    "win jam log net owl pie rug tin van wax"
).split()
"""Short words to offer where a label is more than one token."""


def tokenize(prompts: Sequence[Prompt], tokenizer: Any) -> list[list[tuple[int, str, Segment]]]:
    """Tokens of every prompt as (token id, role, segment).

    The last token has the role "last", special tokens at the start "bos". A token that
    spans two segments (a text's last letters and the colon, say) belongs to the segment
    of its last character.

    Raises
    ------
    InputError
        If the tokenizer ends prompts with a special token, or a prompt is empty.
    """
    strings = [p.string for p in prompts]
    coded = tokenizer(strings, return_offsets_mapping=True, return_special_tokens_mask=True)
    answer = []
    for number, prompt in enumerate(prompts):
        ends = np.cumsum([len(s.text) for s in prompt.segments])
        tokens: list[tuple[int, str, Segment]] = []
        for token, (start, end), special in zip(
            coded["input_ids"][number],
            coded["offset_mapping"][number],
            coded["special_tokens_mask"][number],
            strict=True,
        ):
            if special and end <= start:
                tokens.append((token, "bos", Segment("", "bos")))
                continue
            # A token of no characters (SentencePiece's mark of a word's start) goes with
            # the character that follows it.
            last = max(end - 1, start)
            place = min(int(np.searchsorted(ends, last, side="right")), len(ends) - 1)
            segment = prompt.segments[place]
            tokens.append((token, segment.role, segment))
        if not tokens or tokens[-1][1] == "bos":
            raise InputError(
                f"the tokenizer ends prompt {number} with a special token, so its last position "
                "would not predict the label; pass a tokenizer that adds none at the end"
            )
        token, _, segment = tokens[-1]
        tokens[-1] = (token, "last", segment)
        answer.append(tokens)
    return answer


def label_token_ids(prompts: Sequence[Prompt], labels: Sequence[str], tokenizer: Any) -> list[int]:
    """Token id of each label, as it stands after a query.

    Parameters
    ----------
    prompts
        The first that has a demonstration is used: each label is written behind it as it
        is in the demonstration.
    labels
        Label texts.

    Raises
    ------
    InputError
        If a label is not exactly one token there, or two labels are the same token.
    """
    gaps = ((p, gap) for p in prompts for gap in [_gap(p)] if gap is not None)
    prompt, gap = next(gaps, (prompts[0], " "))
    query = prompt.string
    base = tokenizer(query)["input_ids"]
    ids: dict[int, str] = {}
    for label in labels:
        whole = tokenizer(query + gap + label)["input_ids"]
        tail = whole[len(base) :]
        if whole[: len(base)] != base:
            raise InputError(
                f"with the label {label!r} behind it the query {query[-20:]!r} is tokenized "
                "differently, so its last position would not predict the label; use a template "
                "whose text before the label ends in a token of its own, as in "
                "'{text}: {label}\n'"
            )
        if len(tail) != 1:
            pieces = tokenizer.convert_ids_to_tokens(tail)
            raise InputError(
                f"the label {label!r} is not one token for this tokenizer but {len(tail)} "
                f"({', '.join(map(repr, pieces))}); a label must be one token. "
                f"{_suggest(query + gap, base, labels, tokenizer)}"
            )
        if tail[0] in ids:
            raise InputError(
                f"the labels {ids[tail[0]]!r} and {label!r} are the same token; labels must differ"
            )
        ids[tail[0]] = label
    return list(ids)


def check_label_positions(
    tokens: Sequence[Sequence[tuple[int, str, Segment]]], ids: dict[str, int], tokenizer: Any
) -> None:
    """Refuse prompts in which a demonstration's label is not its label's one token."""
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
                    f"tokenized as {pieces}, not as the one token it is after the query; put "
                    "something between text and label that the tokenizer keeps apart, as in "
                    "'{text}: {label}\\n'"
                )


def _gap(prompt: Prompt) -> str | None:
    """Blanks between the query's end and a label, as the first demonstration has them.

    A user's span may hold them together with the label. None without demonstrations.
    """
    for before, segment in zip(prompt.segments, prompt.segments[1:], strict=False):
        if segment.role == "label":
            start = before.text[len(before.text.rstrip(" ")) :]
            return start + segment.text[: len(segment.text) - len(segment.text.lstrip(" "))]
    return None


def _suggest(start: str, base: list[int], labels: Sequence[str], tokenizer: Any) -> str:
    good = [
        word
        for word in CANDIDATE_LABELS
        if word not in labels and len(tokenizer(start + word)["input_ids"]) == len(base) + 1
    ]
    return f"These are one token: {', '.join(good[:8])}" if good else "Try shorter words"
