"""Coordinates of datasets, each described like a variable."""

from __future__ import annotations

from .variable import PROMPT, PROMPT_LABEL, PROMPT_POSITION, Variable

COORDINATES = {
    "gold": Variable(PROMPT, "str", "right label", "text of the label that answers the query"),
    "query_class": Variable(PROMPT, "str", "class of the query", "class of the query's text"),
    "role": Variable(
        PROMPT_POSITION,
        "str",
        "role of the position",
        "pad, bos, text, separator, label, query, last, or a user's name of a span",
        required=False,
    ),
    "demonstration": Variable(
        PROMPT_POSITION,
        "int",
        "number of the demonstration",
        "from 0; -1 outside demonstrations",
        required=False,
    ),
    "demonstration_class": Variable(
        PROMPT_POSITION,
        "str",
        "class of the demonstration",
        "class of the demonstration's text",
        required=False,
    ),
    "label_text": Variable(
        PROMPT_POSITION,
        "str",
        "label of the demonstration",
        "text of the demonstration's label",
        required=False,
    ),
    "answer_text": Variable(
        PROMPT_LABEL,
        "str",
        "answer",
        "text of the answer, if answers differ by prompt",
        required=False,
    ),
    "answer_token": Variable(
        PROMPT_LABEL,
        "str",
        "first token of the answer",
        "its text, if answers differ by prompt",
        required=False,
    ),
    "answer_tokens": Variable(
        PROMPT_LABEL,
        "int",
        "tokens of the answer",
        "their number, if answers have several",
        required=False,
    ),
    "token_text": Variable(
        ("prompt", "token"), "str", "token of the completion", "its text", required=False
    ),
    "token_number": Variable(
        ("prompt", "token"),
        "int",
        "number of the token",
        "in the completion, from 0; -1 after its end",
        required=False,
    ),
    "span": Variable(
        ("prompt", "token"), "str", "span of the token", "a user's name, or empty", required=False
    ),
    "measured": Variable(
        PROMPT,
        "bool",
        "measured",
        "whether the prompt's unit is done; else values are missing",
        required=False,
    ),
    "finite": Variable(
        PROMPT,
        "bool",
        "finite",
        "whether the prompt's logits at the last position are finite; else values are missing",
        required=False,
    ),
    "token_position": Variable(
        PROMPT_POSITION,
        "int",
        "position in the prompt",
        "counted from the end, the last being 0; stored with keep='labels'",
        required=False,
    ),
}
