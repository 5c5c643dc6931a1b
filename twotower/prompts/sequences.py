"""Prompts with the tokens of answers after them, to score answers of several tokens.

An answer of m tokens is read at m positions: the prompt's last position and those of its first
m - 1 tokens. One sequence serves all answers of a prompt that begin with its tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from .answers import Answers
from .pieces import token_texts
from .prompts import BY_POSITION, Prompts

if TYPE_CHECKING:
    from .model import LoadedModel


@dataclass(frozen=True, eq=False)
class Continued(Prompts):
    """Prompts, each followed by tokens of an answer.

    Attributes
    ----------
    base
        The prompts themselves.
    owner
        (sequence,) number of each sequence's prompt.
    n_added
        (sequence,) number of tokens after the prompt.
    target
        (sequence, read, label) tokens to predict at the last position of the prompt and at the
        added ones, -1 where there is none.
    """

    base: Prompts = field(kw_only=True)
    owner: np.ndarray = field(kw_only=True)
    n_added: np.ndarray = field(kw_only=True)
    target: np.ndarray = field(kw_only=True)

    def check_model(self, model: LoadedModel) -> None:
        """Check that a model reads the same tokens in the prompts, and knows those of answers."""
        # Imported here, as in `Prompts`.
        from .tokenizers import check_prompts, check_tokens

        check_prompts(model, self.base)
        check_tokens(model, self, int(max(self.token_id.max(), self.target.max())))

    @property
    def source(self) -> np.ndarray:
        """(prompt, label) number of the sequence whose score of the answer is used."""
        found = np.zeros((len(self.base), len(self.labels)), dtype=np.int64)
        for number, (owner, target) in enumerate(zip(self.owner, self.target, strict=True)):
            found[owner, (target >= 0).any(axis=0)] = number
        return found

    @property
    def gold_index(self) -> np.ndarray:
        """(sequence,) index of the correct label of each sequence's prompt."""
        if self.labels != self.base.labels:
            return np.zeros(len(self), dtype=np.int64)
        found: np.ndarray = self.base.gold_index[self.owner]
        return found


def base_of(prompts: Prompts) -> Prompts:
    """Return the prompts of sequences, or the prompts themselves."""
    return prompts.base if isinstance(prompts, Continued) else prompts


def owners(prompts: Prompts) -> np.ndarray:
    """Return (sequence,) the number of each sequence's prompt."""
    return prompts.owner if isinstance(prompts, Continued) else np.arange(len(prompts))


def widened(by_position: np.ndarray, prompts: Prompts) -> np.ndarray:
    """Return a (prompt, position) array for sequences; added positions are like the last one."""
    if not isinstance(prompts, Continued):
        return by_position
    columns = np.arange(prompts.n_positions)[None] - prompts.n_positions + prompts.n_added[:, None]
    columns = np.minimum(columns, -1) + prompts.base.n_positions
    taken = np.take_along_axis(by_position[prompts.owner], np.maximum(columns, 0), axis=1)
    there = (columns >= 0) & (prompts.token_id >= 0)
    return np.where(there, taken, np.zeros((), taken.dtype))


def with_answers(prompts: Prompts) -> Continued:
    """Return the sequences that score all answers of prompts.

    Parameters
    ----------
    prompts
        Prompts with answers of any number of tokens.
    """
    added, owners, targets = [], [], []
    width = int(prompts.answers.token_id.shape[2])
    for number, answers in enumerate(prompts.answers.token_id.tolist()):
        whole = [[token for token in ids if token >= 0] for ids in answers]
        for start in _longest([tuple(ids[:-1]) for ids in whole]):
            target = np.full((width, len(whole)), -1, dtype=np.int64)
            for label, ids in enumerate(whole):
                if start[: len(ids) - 1] == tuple(ids[:-1]):
                    target[: len(ids), label] = ids
            added.append(start)
            owners.append(number)
            targets.append(target)
    return continued(prompts, np.array(owners), added, np.array(targets))


def with_completions(prompts: Prompts, completions: Sequence[Sequence[int]]) -> Continued:
    """Return one sequence for each prompt: the prompt and the tokens of its completion.

    Parameters
    ----------
    prompts
        The prompts.
    completions
        Token ids of each prompt's completion, at least one.
    """
    longest = max(map(len, completions))
    target = np.full((len(prompts), longest, 1), -1, dtype=np.int64)
    for row, ids in enumerate(completions):
        target[row, : len(ids), 0] = ids
    added = [tuple(ids[:-1]) for ids in completions]
    return continued(prompts, np.arange(len(prompts)), added, target)


def continued_as(donors: Prompts, prompts: Prompts) -> Prompts:
    """Return donors, each followed by the same tokens of an answer as its prompt.

    Parameters
    ----------
    donors
        One donor for each prompt.
    prompts
        Prompts, or their sequences; then there is a donor for each sequence.
    """
    if not isinstance(prompts, Continued):
        return donors
    width = prompts.n_positions
    added = [
        tuple(ids[width - n :])
        for ids, n in zip(prompts.token_id.tolist(), prompts.n_added, strict=True)
    ]
    return continued(donors, prompts.owner, added, prompts.target)


def continued(
    prompts: Prompts, owner: np.ndarray, added: Sequence[tuple[int, ...]], target: np.ndarray
) -> Continued:
    """Return sequences of prompts and added tokens, whose role is "answer"."""
    lengths, n_added = prompts.lengths[owner], np.array([len(ids) for ids in added])
    shape = (len(owner), int((lengths + n_added).max()))
    fills = {"token_id": -1, "demonstration": -1, "role": "pad"}
    arrays: dict[str, Any] = {}
    for name in BY_POSITION:
        own = getattr(prompts, name)
        whole = np.full(shape, fills.get(name, ""), dtype=own.dtype)
        for row, (number, n) in enumerate(zip(owner, n_added, strict=True)):
            length = int(lengths[row])
            whole[row, shape[1] - n - length : shape[1] - n] = own[number, own.shape[1] - length :]
        arrays[name] = whole
    for row, ids in enumerate(added):
        if ids:
            arrays["token_id"][row, -len(ids) :] = ids
            arrays["role"][row, -len(ids) :] = "answer"
            arrays["token"][row, -len(ids) :] = token_texts(prompts.tokenizer, ids)
    n_labels = target.shape[2]
    # What the walk reads at the last position of the sequence; scores come from `target`.
    last = np.maximum(target, 0)[np.arange(len(owner)), n_added][:, :, None]
    return Continued(
        tuple(prompts.items[i] for i in owner),
        prompts.labels if n_labels == len(prompts.labels) else ("completion",),
        Answers(np.full((len(owner), n_labels), "", dtype=object), last, "first", True),
        tokenizer=prompts.tokenizer,
        task_name=prompts.task_name,
        seed=prompts.seed,
        add_special_tokens=prompts.add_special_tokens,
        tokenizer_hash=prompts.tokenizer_hash,
        base=prompts,
        owner=owner,
        n_added=n_added,
        target=target,
        **arrays,
    )


def _longest(starts: Sequence[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """Return the different beginnings that are not the beginning of another one."""
    found: list[tuple[int, ...]] = []
    for start in sorted(set(starts), key=len, reverse=True):
        if not any(other[: len(start)] == start for other in found):
            found.append(start)
    return sorted(found)
