"""Build prompts: choose demonstrations, their order and their labels."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from ..checks import MOST_PROMPTS, check_is, encodable, one_of, whole, yes_or_no
from ..errors import InputError
from .labels import order_labels
from .prompts import Prompts, assemble
from .segments import TEMPLATE, Prompt, Segment, Template
from .task import Task

if TYPE_CHECKING:
    from .model import LoadedModel

ORDERS = ("shuffled", "alternating", "blocked")


@dataclass(frozen=True)
class Recipe:
    """All settings of a set of prompts, except their number and the tokenizer."""

    task: Task
    labels: tuple[str, ...]
    shots: int | Mapping[str, int]
    seed: int
    template: Template
    order: str
    permute_labels: bool
    shared_demonstrations: bool
    max_positions: int | None
    add_special_tokens: bool = True
    control_tokens: bool = False
    part: str = ""
    """Part of the task's texts, after a split."""

    def describe(self) -> dict[str, Any]:
        """Return the arguments of `build_prompts`, for the provenance."""
        return {
            "shots": self.shots,
            "template": self.template.form,
            "instruction": self.template.instruction,
            "order": self.order,
            "permute_labels": self.permute_labels,
            "shared_demonstrations": self.shared_demonstrations,
            "add_special_tokens": self.add_special_tokens,
            "control_tokens": self.control_tokens,
            "part": self.part,
        }

    def make(self, n: int, tokenizer: Any) -> Prompts:
        """Make the first n prompts."""
        draw = _Draw(self)
        return assemble(
            [draw.prompt(i) for i in range(n)],
            self.labels,
            tokenizer,
            recipe=self,
            task_name=self.task.name,
            seed=self.seed,
            max_positions=self.max_positions,
            add_special_tokens=self.add_special_tokens,
            control_tokens=self.control_tokens,
        )

    def split(
        self, fraction: float, seed: int, n_first: int, n_second: int, tokenizer: Any
    ) -> tuple[Prompts, Prompts]:
        """Make prompts from two parts of the task's texts."""
        halves = self.task.split(fraction, seed)
        first, second = (
            replace(self, task=half, part=f"{self.part}split({fraction}, {seed})[{number}]")
            for number, half in enumerate(halves)
        )
        for part in (first, second):
            part.check_texts()
        return first.make(n_first, tokenizer), second.make(n_second, tokenizer)

    @property
    def most_shots(self) -> int:
        """Largest number of demonstrations of a class."""
        return max(self.shots.values()) if isinstance(self.shots, Mapping) else self.shots

    def check_texts(self) -> None:
        """Check that every class has enough texts for the demonstrations and a query."""
        for name, texts in self.task.texts.items():
            if len(texts) < self.most_shots + 1:
                raise InputError(
                    f"class {name!r} of {self.task.name!r} has {len(texts)} texts here, and "
                    f"{self.most_shots} shots and a query need {self.most_shots + 1}; "
                    "give more texts or fewer shots"
                )


class _Draw:
    """Draws prompts one by one; prompt i does not depend on their number."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.classes = recipe.task.classes
        rng = np.random.default_rng([recipe.seed, 1])
        self.queues = {c: rng.permutation(len(recipe.task.texts[c])) for c in self.classes}
        if recipe.shared_demonstrations:
            # The first texts of each queue are demonstrations; queries come from the rest.
            k = recipe.most_shots
            self.shared = {c: self.queues[c][:k] for c in self.classes}
            self.queues = {c: self.queues[c][k:] for c in self.classes}
            self.shared_order = self._order(rng, self._counts(0))
        self.asked = dict.fromkeys(self.classes, 0)

    def prompt(self, i: int) -> Prompt:
        recipe, n = self.recipe, len(self.classes)
        # A block of n x n prompts pairs every query class with every label once (with fixed
        # labels: has every class n times), so correct answers are balanced.
        block = np.random.default_rng([recipe.seed, 2, i // (n * n)]).permutation(n * n)
        cell = int(block[i % (n * n)])
        query_class = self.classes[cell % n]
        rotation = cell // n if recipe.permute_labels else 0
        labels = {c: recipe.labels[(j + rotation) % n] for j, c in enumerate(self.classes)}

        texts = recipe.task.texts
        queue = self.queues[query_class]
        query = int(queue[self.asked[query_class] % len(queue)])
        self.asked[query_class] += 1

        rng = np.random.default_rng([recipe.seed, 3, i])
        counts = self._counts(rotation)
        if recipe.shared_demonstrations:
            chosen = {c: list(self.shared[c][: counts[c]]) for c in self.classes}
            same = counts == self._counts(0)
            order = self.shared_order if same else self._order(rng, counts)
        else:
            chosen = {}
            for c in self.classes:
                free = [k for k in range(len(texts[c])) if c != query_class or k != query]
                chosen[c] = list(rng.permutation(free)[: counts[c]])
            order = self._order(rng, counts)
        remaining = {c: iter(chosen[c]) for c in self.classes}
        demonstrations = [(texts[c][next(remaining[c])], c, labels[c]) for c in order]
        text = texts[query_class][query]
        return recipe.template.prompt(demonstrations, text, query_class, labels[query_class])

    def _counts(self, rotation: int) -> dict[str, int]:
        """Return the number of demonstrations per class, with labels shifted by `rotation`."""
        shots, n = self.recipe.shots, len(self.classes)
        if not isinstance(shots, Mapping):
            return dict.fromkeys(self.classes, shots)
        return {
            c: shots[self.recipe.labels[(j + rotation) % n]] for j, c in enumerate(self.classes)
        }

    def _order(self, rng: np.random.Generator, counts: Mapping[str, int]) -> list[str]:
        """Return the class of each demonstration, from first to last."""
        blocked = [c for c in self.classes for _ in range(counts[c])]
        if self.recipe.order == "blocked":
            return blocked
        if self.recipe.order == "alternating":
            most = max(counts.values())
            return [c for k in range(most) for c in self.classes if k < counts[c]]
        return [blocked[k] for k in rng.permutation(len(blocked))]


def build_prompts(
    model: LoadedModel,
    task: Task,
    labels: Sequence[str] | Mapping[str, str] | None = None,
    shots: int | Mapping[str, int] = 8,
    n: int = 40,
    seed: int = 0,
    *,
    template: str = TEMPLATE,
    instruction: str = "",
    order: str = "shuffled",
    permute_labels: bool | None = None,
    shared_demonstrations: bool = False,
    add_special_tokens: bool = True,
    control_tokens: bool = False,
) -> Prompts:
    """Build prompts of labelled demonstrations and an unlabelled query.

    Parameters
    ----------
    model
        Model that gives the tokenizer and the context length.
    task
        Texts by class.
    labels
        One word per class, each a single token in the prompt; or a dict of class to word. By
        default foo, bar, map, key, cup, ... Words that are class names are matched to their
        classes, in any order.
    shots
        Demonstrations per label, or a dict of label to number for unbalanced prompts.
    n
        Number of prompts.
    seed
        Seed of all draws. Prompt i is the same for every n > i.
    template
        Format of a demonstration, with {text} and then {label}.
    instruction
        Text before the first demonstration.
    order
        "shuffled" (separately in each prompt), "alternating" (classes in turn) or "blocked"
        (all of the first class, then all of the next).
    permute_labels
        Whether the label of a class changes between prompts, so that each class has each
        label equally often. By default True, unless labels are given by class or are the
        class names.
    shared_demonstrations
        Whether all prompts have the same demonstrations.
    add_special_tokens
        Whether the tokenizer adds its special tokens, as in transformers. Pass False if the
        template or the instruction already contains the BOS token, as chat templates do.
    control_tokens
        Whether the task's texts and labels may contain control tokens of the tokenizer, such
        as <|im_end|>. The template and the instruction always may.

    Returns
    -------
    Prompts
        In every block of (number of classes) squared prompts, correct answers are balanced
        over labels and classes. A query never appears among its demonstrations.

    Raises
    ------
    InputError
        If labels are not distinct single tokens, one per class and the same after every
        prompt; if only some labels are class names and `permute_labels` is not given; if a
        class has too few texts; if the tokenizer drops or does not know a character; or if a
        prompt is longer than the model's context.
    """
    if not hasattr(model, "tokenizer"):
        check_is(model, "Model", "model")
    check_is(task, "Task", "task")
    for name, flag in (
        ("shared_demonstrations", shared_demonstrations),
        ("add_special_tokens", add_special_tokens),
        ("control_tokens", control_tokens),
    ):
        yes_or_no(name, flag)
    labels, permuted = order_labels(task, labels, permute_labels)
    if isinstance(shots, Mapping):
        if set(shots) != set(labels):
            raise InputError(
                f"shots names the labels {', '.join(map(str, shots))}, not {', '.join(labels)}"
            )
        numbers = list(shots.values())
    else:
        numbers = [shots]
    if sum(whole("shots", k) for k in numbers) == 0:
        raise InputError("shots must leave at least one demonstration")
    whole("n", n, 1, MOST_PROMPTS)
    whole("seed", seed)
    one_of("order", order, ORDERS)
    recipe = Recipe(
        task,
        labels,
        shots,
        seed,
        Template(template, instruction),
        order,
        permuted,
        shared_demonstrations,
        model.max_positions,
        bool(add_special_tokens),
        bool(control_tokens),
    )
    recipe.check_texts()
    return recipe.make(n, model.tokenizer)


def _spans(spans: Any, prompt: int) -> list[tuple[int, int]]:
    """Return spans as pairs of integers."""
    try:
        return [(operator.index(start), operator.index(end)) for start, end in spans]
    except (TypeError, ValueError):
        raise InputError(
            f"prompt {prompt}: label_spans={spans!r} must be a list of (start, end), in characters"
        ) from None


def prompts_from_strings(
    model: LoadedModel,
    strings: Sequence[str],
    label_spans: Sequence[Sequence[tuple[int, int]]],
    gold: Sequence[str],
    labels: Sequence[str] | None = None,
    *,
    classes: Sequence[Sequence[str]] | None = None,
    query_class: Sequence[str] | None = None,
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
        If lengths differ; if spans overlap or are empty; if a label is not a single token,
        the same after every prompt; or if the tokenizer drops or does not know a character.

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
    texts: dict[str, Any] = {"strings": strings, "gold": gold}
    texts |= {} if labels is None else {"labels": labels}
    texts |= {} if query_class is None else {"query_class": query_class}
    for name, value in texts.items():
        listed = hasattr(value, "__len__") and not isinstance(value, str)
        if not listed or not all(isinstance(text, str) for text in value):
            raise InputError(f"{name}= must be a list of texts")
        for text in value:
            encodable(f"{name}=", text)
    by_prompt: dict[str, Any] = {"label_spans": label_spans}
    by_prompt |= {} if classes is None else {"classes": classes}
    for name, value in by_prompt.items():
        if not hasattr(value, "__len__"):
            raise InputError(f"{name}= must be a list with an entry for each prompt")
    if not len(strings) == len(label_spans) == len(gold):
        raise InputError(
            f"{len(strings)} strings, {len(label_spans)} lists of spans and {len(gold)} correct "
            "labels; give one of each per prompt"
        )
    for name, entries in (("classes", classes), ("query_class", query_class)):
        if entries is not None and len(entries) != len(strings):
            raise InputError(f"{len(strings)} strings and {len(entries)} entries of {name}=")
    # A pandas Series is indexed by its own index, not by position.
    strings, label_spans, gold = list(strings), list(label_spans), list(gold)
    classes = None if classes is None else list(classes)
    query_class = None if query_class is None else list(query_class)
    items, seen = [], dict.fromkeys(labels if labels is not None else ())
    for i, (string, spans) in enumerate(zip(strings, label_spans, strict=True)):
        begins = bos if bos and string.startswith(bos) else ""
        segments, at = [Segment(begins, "bos")], len(begins)
        spans = _spans(spans, i)
        given = classes[i] if classes is not None else [string[s:e].strip() for s, e in spans]
        if len(given) != len(spans):
            raise InputError(f"prompt {i} has {len(spans)} labels and {len(given)} classes")
        if classes is not None and not all(isinstance(cls, str) and cls for cls in given):
            raise InputError(f"prompt {i}: classes={given!r} must be texts")
        for cls in given:
            encodable(f"prompt {i}: the class", cls)
        if classes is not None and query_class is None and gold[i] not in given:
            raise InputError("classes= other than the labels also need query_class=")
        for number, (span, cls) in enumerate(zip(spans, given, strict=True)):
            start, end = span
            label = string[start:end].strip()
            if not at <= start < end <= len(string) or not label:
                raise InputError(
                    f"prompt {i}: the span ({start}, {end}) of label {number} is empty, overlaps "
                    f"another, or ends beyond the text's {len(string)} characters"
                )
            seen.setdefault(label)
            segments.append(Segment(string[at:start], "text", number, cls, label))
            segments.append(Segment(string[start:end], "label", number, cls, label))
            at = end
        query = string[at:]
        if not query.strip():
            raise InputError(f"prompt {i} ends with a label; add a query after it")
        if query[-1] in " \t":
            raise InputError(
                f"prompt {i} ends in a space, which belongs to the label's token; remove it"
            )
        segments.append(Segment(query, "query"))
        answer_class = query_class[i] if query_class is not None else gold[i]
        kept = tuple(s for s in segments if s.text)
        items.append(Prompt(kept, query.strip(), gold[i], answer_class))
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
        add_special_tokens=bool(add_special_tokens),
        control_tokens=control_tokens,
    )
