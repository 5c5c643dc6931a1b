"""Completions of prompts: their tokens, and the spans of these."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..checks import encodable, is_list
from ..errors import InputError
from .characters import Characters
from .contrast import cut_spans
from .pieces import token_texts
from .prompts import Prompts
from .segments import Segment


@dataclass(frozen=True, eq=False)
class Completions:
    """Tokens of every prompt's completion.

    Attributes
    ----------
    token_id
        For each prompt the ids of its completion's tokens.
    token
        For each prompt the texts of these tokens.
    span
        For each prompt the names of its tokens' spans, "" outside of spans.
    """

    token_id: list[list[int]]
    token: list[list[str]]
    span: list[list[str]]


def read_completions(
    prompts: Prompts,
    completions: Sequence[str],
    spans: Sequence[Mapping[str, Any]] | None = None,
    max_positions: int | None = None,
    control_tokens: bool = False,
) -> Completions:
    """Return the tokens of completions after their prompts.

    Parameters
    ----------
    prompts
        The prompts.
    completions
        For each prompt a text that follows it directly.
    spans
        For each prompt the places of its completion by name, as in `contrast`. A token belongs to
        the span of its last character.
    max_positions
        Largest number of tokens of a prompt with its completion; None for no limit.
    control_tokens
        Whether completions may contain control tokens.

    Raises
    ------
    InputError
        If lengths differ; if a completion is empty, merges with the end of its prompt, is too
        long, or contains a control token or an unknown character; or if a span is empty, overlaps
        another, leaves the text, or has no token.
    """
    for name, given in (("completions", completions), ("spans", spans)):
        listed = is_list(given, sized=True) and not isinstance(given, Mapping)
        if given is None and name == "spans":
            continue
        if given is None or not listed or len(given) != len(prompts):
            raise InputError(
                f"{name}= must be a list with an entry for each of {len(prompts)} prompts"
            )
    tokenizer = prompts.tokenizer
    for number, text in enumerate(completions):
        if not isinstance(text, str) or not text:
            raise InputError(f"prompt {number}: the completion is {text!r}; give a text")
        encodable(f"prompt {number}: the completion", text)
        if "\N{REPLACEMENT CHARACTER}" in text:
            raise InputError(
                f"prompt {number}: the completion contains U+FFFD, as decoding gives for a part of "
                "a character; cut the completion before it"
            )
    whole = [p.string + text for p, text in zip(prompts, completions, strict=True)]
    coded = tokenizer(
        whole, add_special_tokens=prompts.add_special_tokens, return_offsets_mapping=True
    )
    characters = Characters(tokenizer, control_tokens)
    found = Completions([], [], [])
    for number, ids in enumerate(coded["input_ids"]):
        before = prompts.token_id[number][prompts.token_id[number] >= 0].tolist()
        if ids[: len(before)] != before or len(ids) == len(before):
            raise InputError(
                f"prompt {number}: with its completion after it the end of the prompt "
                f"{prompts.items[number].string[-20:]!r} is tokenized differently; begin the "
                "completion with a space or a line break, or end the prompt in a separate token"
            )
        if max_positions is not None and len(ids) - 1 > max_positions:
            raise InputError(
                f"prompt {number} has {len(ids)} tokens with its completion and the model takes "
                f"{max_positions}; use shorter completions"
            )
        tail = ids[len(before) :]
        start = len(prompts.items[number].string)
        places = coded["offset_mapping"][number][len(before) :]
        places = [(max(first - start, 0), end - start) for first, end in places]
        segment = Segment(completions[number], "completion")
        read = [(i, *place, segment) for i, place in zip(tail, places, strict=True)]
        characters.check(number, completions[number], read)
        ends = [end for _, end in places]
        own = {} if spans is None else spans[number]
        found.token_id.append(tail)
        found.token.append(token_texts(tokenizer, tail))
        found.span.append(_spans(number, completions[number], own, ends))
    return found


def _spans(number: int, text: str, spans: Mapping[str, Any], ends: Sequence[int]) -> list[str]:
    """Return the name of the span of each token, "" outside."""
    segments = cut_spans(number, text, spans, taken=("text",))
    stops = np.cumsum([len(segment.text) for segment in segments])
    places = np.searchsorted(stops, np.maximum(np.array(ends) - 1, 0), side="right")
    roles = [segments[min(int(place), len(segments) - 1)].role for place in places]
    for name in spans:
        if name not in roles:
            raise InputError(
                f"prompt {number}: no token ends in the span {name!r} of its completion"
            )
    return ["" if role == "text" else role for role in roles]
