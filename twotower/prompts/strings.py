"""Build prompts from a user's own texts, with spans for the labels."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..checks import check_is, encodable, is_list, yes_or_no
from ..errors import InputError
from .chat import chat_template
from .prompts import Prompts, assemble
from .segments import Prompt, Segment

if TYPE_CHECKING:
    from .model import LoadedModel


def prompts_from_strings(
    model: LoadedModel,
    strings: Sequence[str],
    label_spans: Sequence[Sequence[tuple[int, int]]],
    gold: Sequence[str],
    labels: Sequence[str] | None = None,
    *,
    classes: Sequence[Sequence[str]] | None = None,
    query_class: Sequence[str] | None = None,
    scoring: str = "sum",
    template: str | None = None,
    instruction: str = "",
    add_special_tokens: bool = True,
    control_tokens: bool = False,
) -> Prompts:
    r"""Build prompts from a user's own texts.

    Parameters
    ----------
    model
        Model that gives the tokenizer and the context length.
    strings
        The prompts, each ending directly before the label.
    label_spans
        For each prompt the spans (start, end), in characters, of its demonstrations' labels,
        in order. Text before a label belongs to its demonstration; text after the last label
        is the query.
    gold
        For each prompt the text of the correct label.
    labels
        Label texts, in the order of the dim `label`; by default in order of appearance.
    classes
        For each prompt the class of each demonstration; by default its label.
    query_class
        For each prompt the class of the query; by default its correct label.
    scoring, template, instruction
        As in `contrast`.
    add_special_tokens
        Whether the tokenizer adds its special tokens, as in transformers. If not, a BOS token
        at the start of a string has the role "bos".
    control_tokens
        Whether the strings may contain control tokens of the tokenizer, such as <|im_end|> in
        chat turns.

    Returns
    -------
    Prompts

    Raises
    ------
    InputError
        If lengths differ; if spans overlap or are empty; if a label is not the same tokens
        after every prompt; or if the tokenizer drops or does not know a character.

    Examples
    --------
    >>> strings = ["cat: foo\nParis: bar\ndog:"]
    >>> prompts = prompts_from_strings(model, strings, [[(5, 8), (16, 19)]], ["foo"])
    >>> prompts.labels
    ('foo', 'bar')
    """
    check_is(model, "Model", "model")
    yes_or_no("add_special_tokens", add_special_tokens)
    yes_or_no("control_tokens", control_tokens)
    bos = "" if add_special_tokens else model.tokenizer.bos_token or ""
    _check_texts(strings=strings, gold=gold)
    _check_texts(**_given(labels=labels, query_class=query_class))
    _check_lengths(strings, label_spans, gold, _given(classes=classes, query_class=query_class))
    # A pandas Series is indexed by its own index, not by position.
    strings, label_spans, gold = list(strings), list(label_spans), list(gold)
    classes = None if classes is None else list(classes)
    query_class = None if query_class is None else list(query_class)
    chat = chat_template(model.tokenizer, template, instruction)
    items, seen = [], dict.fromkeys(labels if labels is not None else ())
    for i, (string, given_spans) in enumerate(zip(strings, label_spans, strict=True)):
        spans = _spans(given_spans, i)
        own_labels = [string[start:end].strip() for start, end in spans]
        given = own_labels if classes is None else classes[i]
        if classes is not None:
            _check_classes(i, given, len(spans))
            if query_class is None and gold[i] not in given:
                raise InputError("classes= other than the labels also need query_class=")
        seen |= dict.fromkeys(own_labels)
        answer_class = query_class[i] if query_class is not None else gold[i]
        segments = _segments(i, string, spans, given, bos)
        text = segments[-1].text.strip()
        segments = segments if chat is None else chat.around(segments)
        gap = None if chat is None else chat.gap
        items.append(Prompt(segments, text, gold[i], answer_class, gap=gap))
    unknown = sorted(set(gold) - set(seen))
    if unknown:
        raise InputError(f"the correct label {unknown[0]!r} is not among the labels {list(seen)}")
    if labels is not None and set(seen) != set(labels):
        raise InputError(f"the prompts contain labels that are not in labels={list(labels)}")
    return assemble(
        items,
        list(seen),
        model.tokenizer,
        max_positions=model.max_positions,
        add_special_tokens=bool(add_special_tokens) and chat is None,
        control_tokens=control_tokens,
        scoring=scoring,
    )


def _given(**arguments: Any) -> dict[str, Any]:
    """Return the arguments that are not None."""
    return {name: value for name, value in arguments.items() if value is not None}


def _check_texts(**given: Any) -> None:
    """Check that arguments are lists of texts."""
    for name, value in given.items():
        listed = is_list(value, sized=True)
        if not listed or not all(isinstance(text, str) for text in value):
            raise InputError(f"{name}= must be a list of texts")
        for text in value:
            encodable(f"{name}=", text)


def _check_lengths(
    strings: Sequence[str], label_spans: Any, gold: Sequence[str], given: dict[str, Any]
) -> None:
    """Check that there is one entry for each prompt."""
    for name, value in {"label_spans": label_spans, **given}.items():
        if not is_list(value, sized=True):
            raise InputError(f"{name}= must be a list with an entry for each prompt")
    if not len(strings) == len(label_spans) == len(gold):
        raise InputError(
            f"{len(strings)} strings, {len(label_spans)} lists of spans and {len(gold)} correct "
            "labels; give one of each per prompt"
        )
    for name, entries in given.items():
        if len(entries) != len(strings):
            raise InputError(f"{len(strings)} strings and {len(entries)} entries of {name}=")


def _check_classes(prompt: int, given: Sequence[str], n_labels: int) -> None:
    """Check the classes of a prompt's labels."""
    if len(given) != n_labels:
        raise InputError(f"prompt {prompt} has {n_labels} labels and {len(given)} classes")
    if not all(isinstance(cls, str) and cls for cls in given):
        raise InputError(f"prompt {prompt}: classes={given!r} must be texts")
    for cls in given:
        encodable(f"prompt {prompt}: the class", cls)


def _spans(spans: Any, prompt: int) -> list[tuple[int, int]]:
    """Return spans as pairs of integers."""
    try:
        return [(operator.index(start), operator.index(end)) for start, end in spans]
    except (TypeError, ValueError):
        raise InputError(
            f"prompt {prompt}: label_spans={spans!r} must be a list of (start, end), in characters"
        ) from None


def _segments(
    prompt: int,
    string: str,
    spans: Sequence[tuple[int, int]],
    classes: Sequence[str],
    bos: str,
) -> tuple[Segment, ...]:
    """Cut a text at its labels; the last segment is the query."""
    begins = bos if bos and string.startswith(bos) else ""
    segments, at = [Segment(begins, "bos")], len(begins)
    for number, ((start, end), cls) in enumerate(zip(spans, classes, strict=True)):
        label = string[start:end].strip()
        if not at <= start < end <= len(string) or not label:
            raise InputError(
                f"prompt {prompt}: the span ({start}, {end}) of label {number} is empty, overlaps "
                f"another, or ends beyond the text's {len(string)} characters"
            )
        segments.append(Segment(string[at:start], "text", number, cls, label))
        segments.append(Segment(string[start:end], "label", number, cls, label))
        at = end
    query = string[at:]
    if not query.strip():
        raise InputError(f"prompt {prompt} ends with a label; add a query after it")
    if query[-1] in " \t":
        raise InputError(
            f"prompt {prompt} ends in a space, which belongs to the label's token; remove it"
        )
    segments.append(Segment(query, "query"))
    return tuple(segment for segment in segments if segment.text)
