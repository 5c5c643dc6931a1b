"""Tokenized prompts: token ids, and the role of every position."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np

from ..checks import finite, is_list, one_of, shown, whole
from ..errors import InputError
from ..results.provenance import tokenizer_hash
from .answers import Answers, check_label_positions, read_answers
from .pieces import token_texts
from .segments import PLACES, Prompt
from .tokens import tokenize

if TYPE_CHECKING:
    from .model import LoadedModel
    from .recipe import Recipe


@dataclass(frozen=True, eq=False)
class Prompts:
    """Tokenized prompts, left-padded to a common length T.

    Attributes
    ----------
    items
        The prompts as segments.
    labels
        The dim `label`: texts of the labels, or names of answers that differ by prompt ("right",
        "wrong").
    answers
        Texts and tokens of every prompt's answers, in the order of `labels`.
    token_id
        (prompt, position) token ids, -1 for padding.
    token, role, demonstration_class, label_text
        (prompt, position) strings, "" for padding or outside demonstrations; the role of
        padding is "pad".
    demonstration
        (prompt, position) number of the demonstration, -1 outside demonstrations.
    tokenizer
        Tokenizer of these prompts and of their changed versions.
    recipe
        Settings of `build_prompts`, for splitting; None for a user's own texts.
    task_name, seed
        Name of the task, and seed of the draw.
    add_special_tokens
        Whether the tokenizer adds its special tokens.
    tokenizer_hash
        Hash of the tokenizer when it made the prompts; "" if unknown.
    """

    items: tuple[Prompt, ...]
    labels: tuple[str, ...]
    answers: Answers = field(repr=False)
    token_id: np.ndarray = field(repr=False)
    token: np.ndarray = field(repr=False)
    role: np.ndarray = field(repr=False)
    demonstration: np.ndarray = field(repr=False)
    demonstration_class: np.ndarray = field(repr=False)
    label_text: np.ndarray = field(repr=False)
    tokenizer: Any = field(repr=False)
    recipe: Recipe | None = field(default=None, repr=False)
    task_name: str = ""
    seed: int | None = None
    add_special_tokens: bool = True
    tokenizer_hash: str = field(default="", repr=False)

    def __len__(self) -> int:
        return len(self.items)

    def __repr__(self) -> str:
        return (
            f"Prompts({len(self)} of {self.task_name or 'own texts'!r}, "
            f"labels {self.labels}, up to {self.n_positions} tokens)"
        )

    def __iter__(self) -> Iterator[Prompt]:
        return iter(self.items)

    def __getitem__(self, index: int | slice | Sequence[int] | np.ndarray) -> Prompts:
        """Return some of the prompts, without unneeded padding."""
        if isinstance(index, (int, np.integer)):
            if not -len(self) <= index < len(self):
                raise IndexError(f"prompt {index} of {len(self)}")
            index = [int(index)]
        rows: np.ndarray
        try:
            rows = np.arange(len(self))[index]
        except (IndexError, TypeError) as error:
            if np.asarray(index).dtype.kind in "iu":
                raise IndexError(f"prompts {index!r} of {len(self)}") from error
            rows = np.empty((0, 0))
        if rows.ndim != 1:
            raise InputError(
                f"prompts[{index!r}]: pick prompts by a number, a slice, a list of numbers below "
                f"{len(self)}, or one of True and False for each"
            )
        keep = self.token_id[rows]
        width = int((keep >= 0).sum(axis=1).max()) if len(rows) else 0
        cut = {
            name: getattr(self, name)[rows][:, self.n_positions - width :] for name in BY_POSITION
        }
        return Prompts(
            tuple(self.items[i] for i in rows),
            self.labels,
            self.answers[rows],
            tokenizer=self.tokenizer,
            task_name=self.task_name,
            seed=self.seed,
            add_special_tokens=self.add_special_tokens,
            tokenizer_hash=self.tokenizer_hash,
            **cut,
        )

    @property
    def n_positions(self) -> int:
        """Length of the longest prompt, in tokens."""
        return int(self.token_id.shape[1])

    @property
    def lengths(self) -> np.ndarray:
        """(prompt,) numbers of tokens."""
        found: np.ndarray = (self.token_id >= 0).sum(axis=1)
        return found

    @property
    def strings(self) -> list[str]:
        """The prompts as text."""
        return [p.string for p in self.items]

    @property
    def label_ids(self) -> tuple[int, ...]:
        """First token of each label.

        Raises
        ------
        InputError
            If answers differ by prompt; see `answers`.
        """
        if self.answers.by_prompt:
            raise InputError("answers differ by prompt: their tokens are in prompts.answers")
        return tuple(map(int, self.answers.first[0]))

    @property
    def gold(self) -> np.ndarray:
        """(prompt,) text of the correct label."""
        return np.array([p.gold for p in self.items], dtype=object)

    @property
    def gold_index(self) -> np.ndarray:
        """(prompt,) index of the correct label in `labels`."""
        return np.array([self.labels.index(p.gold) for p in self.items])

    @property
    def query_class(self) -> np.ndarray:
        """(prompt,) class of the query."""
        return np.array([p.query_class for p in self.items], dtype=object)

    @property
    def n_demonstrations(self) -> np.ndarray:
        """(prompt,) numbers of demonstrations with a label."""
        labels = [{s.demonstration for s in p.segments if s.role == "label"} for p in self.items]
        return np.array([len(some) for some in labels])

    @property
    def texts(self) -> set[str]:
        """All texts of the prompts."""
        return set().union(*(p.texts for p in self.items)) if self.items else set()

    @property
    def hash(self) -> str:
        """SHA-256 of the prompts' texts, roles, labels and token ids."""
        content = [
            self.labels,
            self.answers.token_id.tolist() if self.answers.by_prompt else self.label_ids,
            [[p.gold, p.query_class, [list(vars(s).values()) for s in p.segments]] for p in self],
            self.token_id.tolist(),
        ]
        if self.answers.token_id.shape[2] > 1:
            content += [self.answers.scoring, self.answers.token_id.tolist()]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def check_model(self, model: LoadedModel) -> None:
        """Check that a model reads the same tokens in these prompts.

        Every measure calls it, also for reference prompts and donors.

        Parameters
        ----------
        model
            The model to measure.

        Raises
        ------
        InputError
            If the model's tokenizer gives other tokens for the same texts, or the model has no
            embedding for a token.
        """
        # Imported here: a remote run would send a module-level import to the server with donors.
        from .tokenizers import check_prompts

        check_prompts(model, self)

    def _with(self, items: Sequence[Prompt]) -> Prompts:
        """Tokenize changed prompts with the same settings; their texts are already checked."""
        return assemble(
            items,
            self.labels,
            self.tokenizer,
            task_name=self.task_name,
            seed=self.seed,
            add_special_tokens=self.add_special_tokens,
            control_tokens=True,
            scoring=self.answers.scoring,
        )

    def asked_like(self, other: Prompts) -> Prompts:
        """Return the prompts with the answers of other prompts, one for each.

        Parameters
        ----------
        other
            As many prompts, with the same labels.
        """
        if len(self) != len(other):
            raise InputError(f"there are {len(self)} prompts and {len(other)} to take answers from")
        items = tuple(
            replace(item, gold=asked.gold, answers=asked.answers)
            for item, asked in zip(self.items, other.items, strict=True)
        )
        return replace(self, items=items, answers=other.answers, recipe=None)

    def where(self, positions: str) -> np.ndarray:
        """Return a (prompt, position) boolean mask of the positions of a name.

        Parameters
        ----------
        positions
            "last" (where an answer's tokens are predicted), "labels" or "all" (all except
            padding).
        """
        one_of("positions", positions, PLACES)
        if positions == "all":
            return np.asarray(self.token_id >= 0)
        roles = {"last": ("last", "answer"), "labels": ("label",)}[positions]
        return np.isin(self.role, roles)

    def reversed_labels(self) -> Prompts:
        """Return the same prompts with each label replaced by the next (the last by the first).

        With two labels this swaps them, as in Yu & Ananiadou (2024, section 3.3). Classes and
        texts stay the same; the correct label changes too.
        """
        self._needs_labels("reversed_labels")
        shifted = dict(zip(self.labels, self.labels[1:] + self.labels[:1], strict=True))
        items = [p.relabelled(shifted) for p in self.items]
        twin = self._with(items)
        if not np.array_equal(twin.role, self.role):
            raise InputError("with the labels reversed the prompts no longer align, token by token")
        return twin

    def first_tokens(self) -> Prompts:
        """Return the prompts with answers scored by their first tokens.

        If two answers of a prompt begin with the same token, only the right answers remain.
        """
        first = self.answers.first
        differ = all(len(set(row)) == len(row) for row in first.tolist())
        if differ and not self.answers.several:
            return self
        labels, kept = self.labels, np.arange(len(self.labels))[None].repeat(len(self), axis=0)
        items = self.items
        if not differ:
            labels, kept = ("right",), self.gold_index[:, None]
            items = tuple(replace(item, gold="right") for item in items)
        rows = np.arange(len(self))[:, None]
        answers = Answers(
            self.answers.text[rows, kept],
            self.answers.token_id[rows, kept][:, :, :1],
            "first",
            self.answers.by_prompt or not differ,
        )
        return replace(self, items=items, labels=labels, answers=answers)

    def _needs_labels(self, method: str) -> None:
        if self.answers.by_prompt:
            raise InputError(
                f"{method}() changes the labels of classes, and these prompts have answers of "
                "their own; give the changed texts to contrast"
            )

    def reordered(self, orders: Sequence[Sequence[int]]) -> Prompts:
        """Return the same prompts with their demonstrations in another order.

        Parameters
        ----------
        orders
            For each prompt the numbers of its demonstrations, in the new order.

        Raises
        ------
        InputError
            If an order does not name each demonstration once, or if the prompts were made from
            strings, where separators between demonstrations are unknown.
        """
        if not is_list(orders, sized=True) or len(orders) != len(self):
            raise InputError(
                f"orders={shown(orders)} must be {len(self)} lists, one for each prompt"
            )
        items = [p.reordered(order) for p, order in zip(self.items, orders, strict=True)]
        return self._with(items)

    def shuffled_labels(self, seed: int = 0) -> Prompts:
        """Return the same prompts with the labels of their demonstrations in another order.

        Texts, classes, queries and right answers stay the same, so the demonstrations no longer
        show the task (the uninformative prompts of Todd et al. 2024, arXiv:2310.15213).

        Parameters
        ----------
        seed
            Seed of the draw. No demonstration keeps its own label's place.

        Raises
        ------
        InputError
            If a prompt has fewer than two demonstrations.
        """
        items = []
        for number, (prompt, n) in enumerate(zip(self.items, self.n_demonstrations, strict=True)):
            if n < 2:
                raise InputError(
                    f"prompt {number} has {n} demonstrations; labels are shuffled among two or more"
                )
            rng = np.random.default_rng([whole("seed", seed), 23, number])
            order = rng.permutation(n)
            places = np.empty(n, dtype=np.int64)
            places[order] = np.roll(order, 1)  # a random cycle moves every label
            items.append(prompt.with_labels_of(places.tolist()))
        return self._with(items)

    def other_queries(self, seed: int = 0) -> Prompts:
        """Return the same demonstrations, each with a query of another class.

        The queries come from the other prompts. The correct label changes with the class.

        Parameters
        ----------
        seed
            Seed of the draw.

        Raises
        ------
        InputError
            If no other prompt has a query of another class in the prompt's demonstrations.
        """
        self._needs_labels("other_queries")
        rng = np.random.default_rng([whole("seed", seed), 19])
        items = []
        for i, prompt in enumerate(self.items):
            labels = {s.demonstration_class: s.label for s in prompt.segments if s.role == "label"}
            others = [
                other
                for other in self.items
                if other.query_class != prompt.query_class
                and other.query_class in labels
                and other.text not in prompt.texts
            ]
            if not others:
                raise InputError(
                    f"prompt {i}: no other prompt asks about another class of its demonstrations"
                )
            other = others[int(rng.integers(len(others)))]
            items.append(prompt.asking(other, labels[other.query_class]))
        return self._with(items)

    def split(self, fraction: float = 0.5, seed: int = 0) -> tuple[Prompts, Prompts]:
        """Split into two sets of prompts without common texts.

        Prompts from `build_prompts` share demonstration texts. So the task's texts are split,
        and both sets are drawn again with the same settings; the total number of prompts stays
        the same. Prompts from strings, and slices, are only distributed: this needs groups of
        prompts without common texts.

        Parameters
        ----------
        fraction
            Share of the prompts in the first set, strictly between 0 and 1.
        seed
            Seed of the draw.

        Raises
        ------
        InputError
            If a part would be empty, or has too few texts for the demonstrations.
        """
        finite("fraction", fraction)
        if not 0 < fraction < 1:
            raise InputError(f"fraction={fraction} must be strictly between 0 and 1")
        whole("seed", seed)
        n_first = round(fraction * len(self))
        if not 0 < n_first < len(self):
            raise InputError(f"{len(self)} prompts cannot be split by {fraction}: a part is empty")
        if self.recipe is not None:
            sizes = (n_first, len(self) - n_first)
            first, second = self.recipe.split(fraction, seed, *sizes, self.tokenizer)
            return first, second
        return self._split_groups(n_first, seed)

    def _split_groups(self, n_first: int, seed: int) -> tuple[Prompts, Prompts]:
        from scipy.sparse import coo_array
        from scipy.sparse.csgraph import connected_components

        numbers = {text: i for i, text in enumerate(sorted(self.texts))}
        pairs = [(i, numbers[text]) for i, p in enumerate(self.items) for text in sorted(p.texts)]
        rows, columns = np.array(pairs).T
        shape = (len(self), len(numbers))
        shares = coo_array((np.ones(len(pairs)), (rows, columns)), shape=shape).tocsr()
        n_groups, group = connected_components(shares @ shares.T)
        order = np.random.default_rng([seed, 11]).permutation(n_groups)
        sizes = np.cumsum(np.bincount(group, minlength=n_groups)[order])
        if n_groups == 1:
            raise InputError(
                "these prompts cannot be split: all of them are linked by common texts. Split "
                "the prompts that build_prompts returned, or the task (task.split)"
            )
        cut = int(np.argmin(np.abs(sizes[:-1] - n_first))) + 1  # at least one group remains
        first = np.isin(group, order[:cut])
        return self[np.flatnonzero(first)], self[np.flatnonzero(~first)]


BY_POSITION = ("token_id", "token", "role", "demonstration", "demonstration_class", "label_text")


def assemble(
    items: Sequence[Prompt],
    labels: Sequence[str],
    tokenizer: Any,
    *,
    recipe: Recipe | None = None,
    task_name: str = "",
    seed: int | None = None,
    max_positions: int | None = None,
    add_special_tokens: bool = True,
    control_tokens: bool = False,
    scoring: str = "sum",
) -> Prompts:
    """Tokenize prompts and make the padded arrays.

    Raises
    ------
    InputError
        If there are no prompts; if labels are equal, or not the same tokens in every prompt; if
        the tokenizer drops or does not know a character; or if a prompt with its longest answer
        is longer than `max_positions`.
    """
    items, labels = tuple(items), tuple(labels)
    if not items:
        raise InputError("there are no prompts")
    if len(set(labels)) != len(labels):
        raise InputError(f"labels must differ: {', '.join(labels)}")
    how = {"add_special_tokens": add_special_tokens, "control_tokens": control_tokens}
    tokens = tokenize(items, tokenizer, **how)
    width = max(map(len, tokens))
    base = [[token for token, _, _ in prompt] for prompt in tokens]
    answers = read_answers(items, labels, tokenizer, base, scoring=scoring, **how)
    longest = int((np.array(list(map(len, tokens)))[:, None] + answers.n_read - 1).max())
    if max_positions is not None and longest > max_positions:
        raise InputError(
            f"a prompt has {longest} tokens{' with its answer' if longest > width else ''} and "
            f"the model takes {max_positions}; use fewer shots or shorter texts"
        )
    if not answers.by_prompt:
        check_label_positions(items, tokens, labels, answers, tokenizer)
    shape = (len(items), width)
    arrays: dict[str, np.ndarray] = {
        "token_id": np.full(shape, -1, dtype=np.int64),
        "token": np.full(shape, "", dtype=object),
        "role": np.full(shape, "pad", dtype=object),
        "demonstration": np.full(shape, -1, dtype=np.int64),
        "demonstration_class": np.full(shape, "", dtype=object),
        "label_text": np.full(shape, "", dtype=object),
    }
    texts = iter(token_texts(tokenizer, chain.from_iterable(base)))
    for row, prompt in enumerate(tokens):
        own = [next(texts) for _ in prompt]
        first = next((i for i, (_, role, _) in enumerate(prompt) if role != "bos"), 0)
        if not items[row].string.startswith(" "):  # the tokenizer may have added one
            own[first] = own[first].removeprefix(" ")
        arrays["token"][row, width - len(prompt) :] = own
        for column, (token, role, segment) in enumerate(prompt, start=width - len(prompt)):
            arrays["token_id"][row, column] = token
            arrays["role"][row, column] = role
            arrays["demonstration"][row, column] = segment.demonstration
            arrays["demonstration_class"][row, column] = segment.demonstration_class
            arrays["label_text"][row, column] = segment.label
    return Prompts(
        items,
        labels,
        answers,
        tokenizer=tokenizer,
        tokenizer_hash=tokenizer_hash(tokenizer),
        recipe=recipe,
        task_name=task_name,
        seed=seed,
        add_special_tokens=add_special_tokens,
        **arrays,
    )
