"""Answers of prompts: their texts and tokens, and how they are scored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..checks import one_of
from ..errors import InputError
from .characters import Characters
from .segments import Prompt, Segment
from .tokens import encode

SCORINGS = ("sum", "mean", "characters", "first")
"""Ways to score an answer of several tokens."""


@dataclass(frozen=True, eq=False)
class Answers:
    """Possible answers of every prompt.

    Attributes
    ----------
    text
        (prompt, label) texts.
    token_id
        (prompt, label, token) ids of the answers' tokens, -1 after an answer's end.
    scoring
        Score of an answer: "sum" of its tokens' log-probabilities, each given the prompt and
        the answer's earlier tokens; "mean", the sum per token; "characters", the sum per
        character; or the log-probability of the "first" token.
    by_prompt
        Whether prompts have their own answers. If not, `labels` are the answers of all.
    """

    text: np.ndarray
    token_id: np.ndarray
    scoring: str = "sum"
    by_prompt: bool = False
    _found: dict[str, Any] = field(default_factory=dict, repr=False)

    def __getitem__(self, rows: np.ndarray) -> Answers:
        """Return the answers of some prompts."""
        return Answers(self.text[rows], self.token_id[rows], self.scoring, self.by_prompt)

    @property
    def n_tokens(self) -> np.ndarray:
        """(prompt, label) numbers of tokens."""
        found: np.ndarray = (self.token_id >= 0).sum(axis=2)
        return found

    @property
    def n_read(self) -> np.ndarray:
        """(prompt, label) numbers of tokens that the score reads."""
        return np.ones_like(self.n_tokens) if self.scoring == "first" else self.n_tokens

    @property
    def first(self) -> np.ndarray:
        """(prompt, label) ids of the answers' first tokens."""
        found: np.ndarray = self.token_id[:, :, 0]
        return found

    @property
    def several(self) -> bool:
        """Whether a score needs more than the answers' first tokens."""
        return self.scoring != "first" and int(self.token_id.shape[2]) > 1

    @property
    def alone(self) -> bool:
        """Whether each prompt has only its right answer; its rival is the whole vocabulary."""
        return int(self.text.shape[1]) == 1

    @property
    def vocabulary(self) -> tuple[int, ...]:
        """Different first tokens, in the order of the labels if all prompts share them."""
        if self.columns is None:
            return tuple(map(int, self.first[0]))
        return tuple(map(int, np.unique(self.first)))

    @property
    def columns(self) -> np.ndarray | None:
        """(prompt, label) index of first tokens in `vocabulary`; None if prompts share them."""
        if "columns" not in self._found:
            shared = (self.first == self.first[:1]).all()
            places = None if shared else np.searchsorted(np.unique(self.first), self.first)
            self._found["columns"] = places
        columns: np.ndarray | None = self._found["columns"]
        return columns

    @property
    def weights(self) -> np.ndarray:
        """(prompt, label) factors that make scores of the sums over tokens."""
        if self.scoring == "mean":
            return 1 / self.n_tokens
        if self.scoring == "characters":
            lengths = [[len(text.lstrip()) for text in row] for row in self.text]
            return 1 / np.array(lengths, dtype=np.float64)
        return np.ones(self.text.shape)


def read_answers(
    items: Sequence[Prompt],
    labels: Sequence[str],
    tokenizer: Any,
    base: Sequence[Sequence[int]],
    *,
    scoring: str = "sum",
    add_special_tokens: bool = True,
    control_tokens: bool = False,
) -> Answers:
    """Return the tokens of the answers after every prompt.

    Parameters
    ----------
    items
        The prompts. Each answer is appended to its prompt. Labels come after the spaces that
        precede the label in the prompt's first demonstration; a prompt without demonstrations
        uses those of the first prompt with demonstrations.
    labels
        Label texts, or the names of answers that differ by prompt.
    tokenizer, add_special_tokens, control_tokens
        As in `tokenize`.
    base
        Token ids of the prompts.
    scoring
        As in `Answers`.

    Raises
    ------
    InputError
        If the prompt's end and the answer share a token; if a label is not the same tokens
        after every prompt; if two answers of a prompt are scored by the same tokens; or if a
        prompt's own answers are scored by their first tokens and have more or fewer tokens.
    """
    one_of("scoring", scoring, SCORINGS)
    by_prompt = any(prompt.answers for prompt in items)
    gaps = [_gap(prompt) for prompt in items]
    usual = next((gap for gap in gaps if gap is not None), " ")
    starts = [p.string + (usual if g is None else g) for p, g in zip(items, gaps, strict=True)]
    characters = Characters(tokenizer, control_tokens)
    read: list[list[list[int]]] = []
    texts: list[list[str]] = []
    for number, label in enumerate(labels):
        if by_prompt:
            own = [prompt.answers[number] for prompt in items]
            whole = [prompt.string + text for prompt, text in zip(items, own, strict=True)]
        else:
            own = [label] * len(items)
            whole = [start + label for start in starts]
        coded = encode(whole, tokenizer, add_special_tokens)
        tails = [
            _tail(i, items[i].string, text, ids, base[i], tokenizer)
            for i, (ids, text) in enumerate(zip(coded, own, strict=True))
        ]
        if not by_prompt:
            _check_same(label, tails, tokenizer)
        for text, ids in set(zip(own, map(tuple, tails), strict=True)):
            for token in ids:
                characters.check_label(text.strip(), token)
        read.append(tails)
        texts.append(own)
    longest = max(len(tail) for tails in read for tail in tails)
    token_id = np.full((len(items), len(labels), longest), -1, dtype=np.int64)
    for column, tails in enumerate(read):
        for row, tail in enumerate(tails):
            token_id[row, column, : len(tail)] = tail
    found = Answers(np.array(texts, dtype=object).T, token_id, scoring, by_prompt)
    _check_differ(found)
    if by_prompt and scoring == "first":
        _check_lengths(found)
    return found


def _tail(
    number: int, string: str, answer: str, ids: list[int], before: Sequence[int], tokenizer: Any
) -> list[int]:
    """Return the tokens of an answer after its prompt."""
    tail = ids[len(before) :]
    if ids[: len(before)] != list(before):
        raise InputError(
            f"prompt {number}: with the answer {answer!r} after it the end of the prompt "
            f"{string[-20:]!r} is tokenized differently, so its last position would not predict "
            "the answer; end the text before the answer in a separate token, as the template "
            "'{text}: {label}\\n' does"
        )
    if not tail:
        raise InputError(f"prompt {number}: the tokenizer makes no token of the answer {answer!r}")
    return tail


def _check_same(label: str, tails: Sequence[Sequence[int]], tokenizer: Any) -> None:
    """Check that a label is the same tokens after every prompt."""
    for number, tail in enumerate(tails):
        if list(tail) != list(tails[0]):
            there, first = (_pieces(ids, tokenizer) for ids in (tail, tails[0]))
            raise InputError(
                f"prompt {number}: the label {label!r} would be {there} here and is {first} "
                "after prompt 0; write the same characters before the labels in every prompt"
            )


def _check_differ(answers: Answers) -> None:
    """Check that the answers of each prompt are scored by different tokens."""
    scored = answers.token_id[:, :, :1] if answers.scoring == "first" else answers.token_id
    n = scored.shape[1]
    for first in range(n):
        for second in range(first + 1, n):
            same = (scored[:, first] == scored[:, second]).all(axis=1)
            if same.any():
                row = int(np.flatnonzero(same)[0])
                one, two = answers.text[row, first], answers.text[row, second]
                where = f"prompt {row}: " if answers.by_prompt else ""
                if answers.scoring == "first" and one != two:
                    raise InputError(
                        f"{where}{one!r} and {two!r} begin with the same token, so scoring="
                        "'first' cannot tell them apart; use scoring='sum'"
                    )
                raise InputError(
                    f"{where}{one!r} and {two!r} are the same tokens; answers must differ"
                )


def _check_lengths(answers: Answers) -> None:
    """Check that the answers of each prompt have as many tokens.

    The first token of a longer answer is only its beginning, and more probable than the answer.
    """
    for number, counts in enumerate(answers.n_tokens):
        if (counts != counts[0]).any():
            column = int((counts != counts[0]).argmax())
            one, two = (answers.text[number, i] for i in (0, column))
            raise InputError(
                f"prompt {number}: {one!r} has {counts[0]} tokens and {two!r} {counts[column]}, so "
                "their first tokens cannot be compared; use scoring='sum', 'mean' or 'characters'"
            )


def check_label_positions(
    items: Sequence[Prompt],
    tokens: Sequence[Sequence[tuple[int, str, Segment]]],
    labels: Sequence[str],
    answers: Answers,
    tokenizer: Any,
) -> None:
    """Check that each demonstration's label is the same tokens as after the query."""
    known = {
        label: _visible(ids[ids >= 0].tolist(), tokenizer)
        for label, ids in zip(labels, answers.token_id[0], strict=True)
    }
    for number, prompt in enumerate(tokens):
        if items[number].gap is not None:  # a label in the text may follow another character
            continue
        found: dict[int, list[int]] = {}
        held = {s.demonstration: s.label for _, _, s in prompt if s.demonstration >= 0}
        for token, role, segment in prompt:
            if role == "label":
                found.setdefault(segment.demonstration, []).append(token)
        for demonstration, label in held.items():
            if found.get(demonstration) != known[label]:
                raise InputError(
                    f"prompt {number}, demonstration {demonstration}: the label {label!r} is "
                    f"tokenized as {_pieces(found.get(demonstration, []), tokenizer)}, not as "
                    f"{_pieces(known[label], tokenizer)} as after the query; put a separator "
                    "between text and label that the tokenizer does not merge, as in "
                    "'{text}: {label}\\n'"
                )


def _visible(ids: list[int], tokenizer: Any) -> list[int]:
    """Return tokens without a separate token of the space before a word.

    In a demonstration that token belongs to the text before the label.
    """
    first = next((i for i, token in enumerate(ids) if tokenizer.decode([token]).strip()), 0)
    return ids[first:]


def _pieces(ids: Sequence[int], tokenizer: Any) -> str:
    return " ".join(map(repr, tokenizer.convert_ids_to_tokens(list(ids)))) or "no token"


def _gap(prompt: Prompt) -> str | None:
    """Return the text before the answer, by default the spaces before the first label.

    A user's label span may include them. None without a label.
    """
    if prompt.gap is not None:
        return prompt.gap
    for before, segment in zip(prompt.segments, prompt.segments[1:], strict=False):
        if segment.role == "label":
            start = before.text[len(before.text.rstrip(" ")) :]
            return start + segment.text[: len(segment.text) - len(segment.text.lstrip(" "))]
    return None
