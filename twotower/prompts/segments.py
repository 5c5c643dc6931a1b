"""A prompt as a list of segments with roles.

Prompts are assembled from segments and never searched for their parts. A token belongs to the
segment that contains its last character.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ..checks import encodable, is_list, shown
from ..errors import InputError

ROLES = ("pad", "bos", "text", "separator", "label", "query", "last", "answer")
"""Roles that this package gives; users may name further ones.

"last" is the position that predicts the answer's first token. "answer" are the tokens of an
answer that predict its further tokens.
"""

PLACES = ("last", "labels", "all")
"""Names of positions: where an answer's tokens are predicted, labels, and all except padding."""

TEMPLATE = "{text}: {label}\n"


@dataclass(frozen=True)
class Segment:
    """A contiguous part of a prompt.

    Parameters
    ----------
    text
        Its characters.
    role
        One of `ROLES`, or the user's own name of a span.
    demonstration
        Number of its demonstration, from 0; -1 for the query.
    demonstration_class, label
        Class and label of its demonstration; "" for the query.
    """

    text: str
    role: str
    demonstration: int = -1
    demonstration_class: str = ""
    label: str = ""


@dataclass(frozen=True)
class Prompt:
    """One prompt.

    Parameters
    ----------
    segments
        Its parts, in order.
    text, query_class
        Text and class of the query.
    gold
        The correct label, or the name of the right answer.
    answers
        The prompt's own answers, as they follow it, in the order of the labels; empty if the
        labels are the answers.
    gap
        Text between the prompt and a label; None: the spaces before the labels of
        demonstrations.
    """

    segments: tuple[Segment, ...]
    text: str
    gold: str
    query_class: str
    answers: tuple[str, ...] = ()
    gap: str | None = None

    @property
    def string(self) -> str:
        """The prompt as one string, the input of the tokenizer."""
        return "".join(s.text for s in self.segments)

    @property
    def texts(self) -> set[str]:
        """Texts of the demonstrations and the query, without spaces around them.

        In a user's own string these spaces depend on the text's place in the prompt. A prompt
        without a query is one text.
        """
        parts = [s.text.strip() for s in self.segments if s.role in ("text", "query")]
        return set(parts) if any(s.role == "query" for s in self.segments) else {self.string}

    def relabelled(self, new: dict[str, str]) -> Prompt:
        """Return the prompt with every label replaced by another."""
        segments = tuple(
            replace(
                s,
                text=s.text.replace(s.label, new[s.label]) if s.role == "label" else s.text,
                label=new.get(s.label, s.label),
            )
            for s in self.segments
        )
        return replace(self, segments=segments, gold=new[self.gold])

    def with_labels_of(self, order: Sequence[int]) -> Prompt:
        """Return the prompt in which demonstration i has the label of demonstration order[i]."""
        labels = {s.demonstration: s for s in self.segments if s.role == "label"}
        segments = tuple(
            s
            if s.demonstration < 0
            else replace(
                s,
                text=labels[order[s.demonstration]].text if s.role == "label" else s.text,
                label=labels[order[s.demonstration]].label,
            )
            for s in self.segments
        )
        return replace(self, segments=segments)

    def reordered(self, order: Sequence[int]) -> Prompt:
        """Return the prompt with its demonstrations in another order.

        Parameters
        ----------
        order
            Numbers of the demonstrations, from first to last.
        """
        numbers = [s.demonstration for s in self.segments]
        known = sorted({n for n in numbers if n >= 0})
        if not is_list(order) or sorted(order) != known:
            raise InputError(f"order={shown(order)} does not name each demonstration once")
        if not any(s.role == "separator" and s.demonstration >= 0 for s in self.segments):
            raise InputError(
                "demonstrations of a prompt from a string cannot be reordered; use build_prompts"
            )
        first = numbers.index(min(n for n in numbers if n >= 0))
        last = len(numbers) - numbers[::-1].index(max(numbers))
        moved = [
            replace(s, demonstration=place)
            for place, number in enumerate(order)
            for s in self.segments
            if s.demonstration == number
        ]
        return replace(self, segments=(*self.segments[:first], *moved, *self.segments[last:]))

    def asking(self, other: Prompt, gold: str) -> Prompt:
        """Return the prompt with another prompt's query."""
        (query,) = (s for s in other.segments if s.role == "query")
        segments = tuple(query if s.role == "query" else s for s in self.segments)
        return Prompt(segments, other.text, gold, other.query_class)


@dataclass(frozen=True)
class Template:
    """Format of a text and its label.

    Parameters
    ----------
    form
        Contains {text} and then {label}, once each. The query uses the same form up to
        {label}, without trailing spaces.
    instruction
        Text before the first demonstration.
    """

    form: str = TEMPLATE
    instruction: str = ""

    def __post_init__(self) -> None:
        for name, text in (("template", self.form), ("instruction", self.instruction)):
            if not isinstance(text, str):
                raise InputError(f"{name}={shown(text)} must be a text")
            encodable(f"{name}=", text)
        ok = self.form.count("{text}") == 1 and self.form.count("{label}") == 1
        if not ok or self.form.index("{text}") > self.form.index("{label}"):
            raise InputError(
                f"template {self.form!r} must hold {{text}} and then {{label}}, once each, as in "
                f"{TEMPLATE!r}"
            )
        if not self.parts[1].strip():
            raise InputError(
                f"template {self.form!r} needs a visible character between {{text}} and "
                "{label}: the last position is the token before the label"
            )

    @property
    def parts(self) -> tuple[str, str, str]:
        """Parts before the text, between text and label, and after the label."""
        before, rest = self.form.split("{text}")
        between, after = rest.split("{label}")
        return before, between, after

    @property
    def gap(self) -> str:
        """Spaces between the prompt's end and an answer."""
        between = self.parts[1]
        return between[len(between.rstrip(" ")) :]

    def prompt(
        self,
        demonstrations: Sequence[tuple[str, str, str]],
        query: str,
        query_class: str,
        gold: str,
    ) -> Prompt:
        """Make a prompt from demonstrations (text, class, label) and a query."""
        before, between, after = self.parts
        segments = [Segment(self.instruction, "separator")]
        for number, (text, cls, label) in enumerate(demonstrations):
            about = (number, cls, label)
            segments += [
                Segment(before, "separator", *about),
                Segment(text, "text", *about),
                Segment(between, "separator", *about),
                Segment(label, "label", *about),
                Segment(after, "separator", *about),
            ]
        segments += [
            Segment(before, "separator"),
            Segment(query, "query"),
            # A space belongs to the label's token; a line break is a separate token.
            Segment(between.rstrip(" "), "separator"),
        ]
        return Prompt(tuple(s for s in segments if s.text), query, gold, query_class)
