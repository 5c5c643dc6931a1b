"""Prompts in the chat template of a tokenizer: every demonstration is a turn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ..checks import shown
from ..errors import InputError
from .segments import Prompt, Segment, Template

CHAT = "chat"
"""Name of the template that stands for the tokenizer's own."""

MARKS = ("\ue000", "\ue001")
"""Private-use characters around the number of a message in a rendered template."""


@dataclass(frozen=True)
class ChatTemplate:
    """The tokenizer's chat template, with the same methods as `Template`.

    A demonstration is a user's message and the assistant's answer; the query is the last user's
    message, followed by the template's beginning of an answer. So the tokens equal those of
    ``tokenizer.apply_chat_template(messages, add_generation_prompt=True)``.

    Parameters
    ----------
    tokenizer
        A tokenizer with a chat template.
    instruction
        Text of the system message; none if empty.
    """

    tokenizer: Any = field(repr=False)
    instruction: str = ""
    form: str = CHAT

    def __post_init__(self) -> None:
        if getattr(self.tokenizer, "chat_template", None) is None:
            raise InputError(
                "template='chat' needs a tokenizer with a chat template, which this one lacks; "
                "write the template, as in '{text}: {label}\\n'"
            )

    @property
    def gap(self) -> str:
        """Text between the prompt's end and an answer."""
        return ""

    def prompt(
        self,
        demonstrations: Sequence[tuple[str, str, str]],
        query: str,
        query_class: str,
        gold: str,
    ) -> Prompt:
        """Make a prompt from demonstrations (text, class, label) and a query."""
        parts = [Segment(self.instruction, "separator")] if self.instruction else []
        for number, (text, cls, label) in enumerate(demonstrations):
            about = (number, cls, label)
            parts += [Segment(text, "text", *about), Segment(label, "label", *about)]
        parts.append(Segment(query, "query"))
        return Prompt(self._rendered(parts), query, gold, query_class)

    def around(self, segments: Sequence[Segment]) -> tuple[Segment, ...]:
        """Return the segments of one user's message, with the template around them."""
        message = Segment("".join(segment.text for segment in segments), "query")
        system = [Segment(self.instruction, "separator")] if self.instruction else []
        found = self._rendered([*system, message])
        place = next(i for i, segment in enumerate(found) if segment.role == "query")
        return (*found[:place], *segments, *found[place + 1 :])

    def _rendered(self, messages: Sequence[Segment]) -> tuple[Segment, ...]:
        """Return messages and the template's text between them, as segments.

        The text after a message of a demonstration belongs to the demonstration.
        """
        marked = self._render([f"{MARKS[0]}{i}{MARKS[1]}" for i in range(len(messages))])
        found: list[Segment] = []
        rest, last = marked, Segment("", "separator")
        for i, message in enumerate(messages):
            before, mark, rest = rest.partition(f"{MARKS[0]}{i}{MARKS[1]}")
            if not mark:
                raise InputError(f"the chat template leaves out a message: {message.text[:40]!r}")
            found += [replace(last, text=before, role="separator"), message]
            last = message
        found.append(Segment(rest, "separator"))
        whole = self._render([message.text for message in messages])
        if whole != "".join(segment.text for segment in found):
            raise InputError(
                "the chat template changes the text of messages, so their places are unknown; "
                "render them yourself and use prompts_from_strings"
            )
        return tuple(segment for segment in found if segment.text)

    def _render(self, contents: Sequence[str]) -> str:
        """Return the rendered template for the contents of all messages."""
        messages = [{"role": "system", "content": contents[0]}] if self.instruction else []
        for turn, content in enumerate(contents[len(messages) :]):
            messages.append({"role": ("user", "assistant")[turn % 2], "content": content})
        try:
            text: str = self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True
            )
        except Exception as error:  # jinja2's errors, and those that templates raise
            raise InputError(f"the chat template cannot be used: {error}") from error
        return text


def make_template(form: str, instruction: str, tokenizer: Any) -> Template | ChatTemplate:
    """Return a template from a user's arguments; "chat" is the tokenizer's own."""
    if isinstance(form, str) and form == CHAT:
        return ChatTemplate(tokenizer, instruction)
    return Template(form, instruction)


def chat_template(tokenizer: Any, template: str | None, instruction: str) -> ChatTemplate | None:
    """Return the tokenizer's template for a user's whole texts; None without a template.

    Raises
    ------
    InputError
        If the template is another one, or a system message has no template.
    """
    if template is None:
        if not isinstance(instruction, str) or instruction:
            raise InputError("instruction= is the system message of a chat; pass template='chat'")
        return None
    if not isinstance(template, str) or template != CHAT:
        raise InputError(f"template={shown(template)}: whole texts take no template but 'chat'")
    return ChatTemplate(tokenizer, instruction)
