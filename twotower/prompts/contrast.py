"""Prompts with right and wrong answers of their own."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence, Set
from typing import TYPE_CHECKING, Any

from ..checks import check_is, encodable, is_list, shown, yes_or_no
from ..errors import InputError
from .chat import chat_template
from .prompts import Prompts, assemble
from .segments import ROLES, Prompt, Segment

if TYPE_CHECKING:
    from .model import LoadedModel

Spans = Mapping[str, Any]
"""Places of a prompt by name: a text that occurs once, or (start, end) in characters."""


def contrast(
    model: LoadedModel,
    texts: Sequence[str],
    right: Sequence[str],
    wrong: Sequence[str] | Sequence[Sequence[str]] | None = None,
    spans: Sequence[Spans] | None = None,
    *,
    name: str = "contrast",
    scoring: str = "sum",
    join: str | None = None,
    template: str | None = None,
    instruction: str = "",
    add_special_tokens: bool = True,
    control_tokens: bool = False,
) -> Prompts:
    """Make prompts, each with a right answer and wrong answers of its own.

    Parameters
    ----------
    model
        Model that gives the tokenizer and the context length.
    texts
        The prompts, each ending directly before the answer.
    right
        For each prompt its right answer.
    wrong
        For each prompt its wrong answer, or as many wrong answers as for the others. None: the
        right answer's rival is the rest of the vocabulary, and margins are its log-probability.
    spans
        For each prompt the places that matter, by name: a text that occurs in it once, or
        (start, end) in characters. The names are roles, as in ``at(role="subject")``; other
        positions have the role "text". The last position always has the role "last".
    name
        Name of the task, for records and reports.
    scoring
        Score of an answer of several tokens: "sum" of their log-probabilities, each given the
        prompt and the tokens before it; "mean" per token; "characters", the sum per character after
        leading blanks; or the log-probability of the "first" token, for answers of as many tokens.
    join
        Text before every answer, such as " ". None: answers are appended as they are, and a
        letter may not follow a letter.
    template
        "chat": every text is the user's message in the tokenizer's chat template, and the
        assistant answers.
    instruction
        System message of a chat.
    add_special_tokens, control_tokens
        As in `prompts_from_strings`.

    Returns
    -------
    Prompts
        Their `labels` are "right", "wrong", "wrong 2", ...

    Raises
    ------
    InputError
        If there are no texts, or lengths differ; if an answer is empty, equals a wrong one,
        merges with the end of its prompt, or is scored by its first token and has more tokens
        than another; if a span is empty, overlaps another, leaves the text, or holds no token of
        its own; or if a prompt with its answer is longer than the model's context.

    Examples
    --------
    >>> prompts = contrast(
    ...     model,
    ...     ["When Mary and John left, John thanked"],
    ...     right=[" Mary"],
    ...     wrong=[" John"],
    ...     spans=[{"IO": "Mary", "S2": (25, 29)}],
    ... )
    >>> prompts.labels
    ('right', 'wrong')
    """
    if not hasattr(model, "max_positions"):
        check_is(model, "Model", "model")
    yes_or_no("add_special_tokens", add_special_tokens)
    yes_or_no("control_tokens", control_tokens)
    if not isinstance(name, str):
        raise InputError(f"name={shown(name)} must be a text")
    if join is not None and not isinstance(join, str):
        raise InputError(f"join={shown(join)} must be a text or None")
    strings = _texts("texts", texts)
    if not strings:
        raise InputError("texts= is empty: give at least one prompt")
    answers = [[text] for text in _texts("right", right, len(strings))]
    for own, others in zip(answers, _wrong(wrong, len(strings)), strict=True):
        own += others
    if spans is not None and (
        isinstance(spans, (str, Mapping)) or len(_listed("spans", spans)) != len(strings)
    ):
        raise InputError(
            f"spans= must be a list with a dict for each of the {len(strings)} prompts"
        )
    named = [{}] * len(strings) if spans is None else list(spans)
    chat = chat_template(model.tokenizer, template, instruction)
    items = []
    for number, (string, own) in enumerate(zip(strings, answers, strict=True)):
        segments = cut_spans(number, string, named[number])
        segments = segments if chat is None else chat.around(segments)
        end = segments[-1].text
        joined = tuple(_joined(number, end, answer, join) for answer in own)
        items.append(Prompt(segments, string, "right", "", joined))
    names = ["right", "wrong", *(f"wrong {k}" for k in range(2, len(answers[0])))]
    found = assemble(
        items,
        names[: len(answers[0])],
        model.tokenizer,
        task_name=name,
        max_positions=model.max_positions,
        add_special_tokens=bool(add_special_tokens) and chat is None,
        control_tokens=control_tokens,
        scoring=scoring,
    )
    _check_roles(found)
    return found


def _listed(name: str, given: Any) -> list[Any]:
    # A set has no order, and of a dict only the keys would count.
    if isinstance(given, (Mapping, Set)) or not is_list(given, sized=True):
        raise InputError(f"{name}= must be a list with an entry for each prompt")
    return list(given)


def _texts(name: str, given: Any, n: int | None = None) -> list[str]:
    """Return a list of texts that are not empty."""
    found = _listed(name, given)
    if n is not None and len(found) != n:
        raise InputError(f"there are {n} texts and {len(found)} entries of {name}=")
    for number, text in enumerate(found):
        if not isinstance(text, str):
            raise InputError(f"{name}= must be a list of texts; entry {number} is {text!r}")
        if not text.strip():
            raise InputError(f"prompt {number}: {name}= holds an empty text")
        encodable(f"{name}=", text)
    return found


def _wrong(wrong: Any, n: int) -> list[list[str]]:
    """Return the wrong answers of each prompt."""
    if wrong is None:
        return [[] for _ in range(n)]
    given = _listed("wrong", wrong)
    if len(given) != n:
        raise InputError(f"there are {n} texts and {len(given)} entries of wrong=")
    found = []
    for number, entry in enumerate(given):
        if not isinstance(entry, str) and not is_list(entry, sized=True):
            raise InputError(
                f"wrong= must hold a text or a list of texts for each prompt; entry {number} is "
                f"{entry!r}"
            )
        found.append(_texts("wrong", [entry] if isinstance(entry, str) else entry))
    for number, others in enumerate(found):
        if not others:
            raise InputError(
                f"prompt {number} has no wrong answer; give each prompt as many, at least one, or "
                "wrong=None for the rest of the vocabulary"
            )
        if len(others) != len(found[0]):
            raise InputError(
                f"prompt {number} has {len(others)} wrong answers and prompt 0 has "
                f"{len(found[0])}; give each prompt as many"
            )
    return found


def _joined(number: int, string: str, answer: str, join: str | None) -> str:
    if join is not None:
        return join + answer
    if (
        string[-1].isalnum()
        and answer[0].isalnum()
        and string[-1].isascii()
        and answer[0].isascii()
    ):
        raise InputError(
            f"prompt {number}: the answer {answer!r} would follow {string[-10:]!r} without a "
            f"space; write {' ' + answer!r}, or pass join=' ' (join='' if it is meant)"
        )
    return answer


def cut_spans(
    number: int, string: str, spans: Any, taken: Sequence[str] = ROLES
) -> tuple[Segment, ...]:
    """Return the segments of a text, cut at its spans; the rest has the role "text".

    Parameters
    ----------
    number, string
        Number of the prompt, for messages, and its text.
    spans
        Places by name, as in `contrast`.
    taken
        Names that a span may not have.
    """
    if not isinstance(spans, Mapping):
        raise InputError(f"prompt {number}: spans={spans!r} must be a dict of name to place")
    places = sorted((*_place(number, string, name, at, taken), name) for name, at in spans.items())
    segments, end = [], 0
    for start, stop, name in places:
        if start < end:
            raise InputError(f"prompt {number}: the span {name!r} overlaps another")
        segments += [Segment(string[end:start], "text"), Segment(string[start:stop], name)]
        end = stop
    segments.append(Segment(string[end:], "text"))
    return tuple(segment for segment in segments if segment.text)


def _place(number: int, string: str, name: Any, at: Any, taken: Sequence[str]) -> tuple[int, int]:
    """Return where a span starts and ends."""
    if not isinstance(name, str) or not name or name in taken:
        raise InputError(
            f"prompt {number}: {name!r} cannot name a span; use a text other than "
            f"{', '.join(taken)}"
        )
    if isinstance(at, str):
        times = sum(string.startswith(at, i) for i in range(len(string))) if at else 0
        if times != 1:
            raise InputError(
                f"prompt {number}: {at!r} occurs {times} times; "
                f"give the span {name!r} as (start, end), in characters"
            )
        start = string.index(at)
        return start, start + len(at)
    try:
        start, stop = map(operator.index, at)
    except (TypeError, ValueError):
        raise InputError(
            f"prompt {number}: the span {name!r} must be a text or (start, end), not {at!r}"
        ) from None
    if not 0 <= start < stop <= len(string):
        raise InputError(
            f"prompt {number}: the span {name!r} ({start}, {stop}) is empty or leaves the text of "
            f"{len(string)} characters"
        )
    return start, stop


def _check_roles(prompts: Prompts) -> None:
    """Check that every span has a token of its own."""
    for number, (prompt, roles) in enumerate(zip(prompts, prompts.role, strict=True)):
        for segment in prompt.segments:
            if segment.role not in roles and segment.role not in ROLES:
                raise InputError(
                    f"prompt {number}: the span {segment.role!r} ({segment.text!r}) has no token "
                    "of its own: its characters belong to the next token, or to the last one, "
                    "whose role is 'last'"
                )
