"""Build prompts: choose demonstrations, their order and their labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from ..checks import MOST_PROMPTS, check_is, one_of, whole, yes_or_no
from ..errors import InputError
from .chat import ChatTemplate, make_template
from .labels import order_labels
from .pair_prompts import PairRecipe
from .pair_task import PairTask
from .prompts import Prompts, assemble
from .segments import TEMPLATE, Prompt, Template
from .task import Task

if TYPE_CHECKING:
    from .model import LoadedModel

ORDERS = ("shuffled", "alternating", "blocked")


@dataclass(frozen=True)
class TaskRecipe:
    """All settings of a set of prompts, except their number and the tokenizer."""

    task: Task
    labels: tuple[str, ...]
    shots: int | Mapping[str, int]
    seed: int
    template: Template | ChatTemplate
    order: str
    permute_labels: bool
    shared_demonstrations: bool
    max_positions: int | None
    add_special_tokens: bool = True
    control_tokens: bool = False
    scoring: str = "sum"
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
            scoring=self.scoring,
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

    def __init__(self, recipe: TaskRecipe) -> None:
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
    task: Task | PairTask,
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
    scoring: str = "sum",
    wrong: int = 1,
) -> Prompts:
    """Build prompts of labelled demonstrations and an unlabelled query.

    Parameters
    ----------
    model
        Model that gives the tokenizer and the context length.
    task
        Texts by class, or pairs of an input and an output.
    labels
        One word per class, of any number of tokens; or a dict of class to word. By
        default foo, bar, map, key, cup, ... Words that are class names are matched to their
        classes, in any order.
    shots
        Demonstrations per label, or a dict of label to number for unbalanced prompts.
    n
        Number of prompts.
    seed
        Seed of all draws. Prompt i is the same for every n > i.
    template
        Format of a demonstration, with {text} and then {label}. "chat": the tokenizer's chat
        template, in which texts are the user's messages and labels the assistant's; the tokens
        equal those of ``tokenizer.apply_chat_template``.
    instruction
        Text before the first demonstration; the system message of a chat.
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
        template or the instruction already contains the BOS token. Chat templates contain it
        where the model needs one, so none is added to them.
    control_tokens
        Whether the task's texts and labels may contain control tokens of the tokenizer, such
        as <|im_end|>. The template and the instruction always may.
    scoring
        Score of a label or answer of several tokens: "sum" of their log-probabilities, each given
        the prompt and the tokens before it; "mean" per token; "characters", the sum per
        character after leading blanks; or the log-probability of the "first" token. Of pairs, the
        "first" tokens are compared only of answers of as many tokens: other pairs are not asked.
    wrong
        Of tasks of pairs: number of wrong answers of each prompt, drawn from the outputs of other
        pairs. 0: the rest of the vocabulary is the right answer's rival.

    Returns
    -------
    Prompts
        In every block of (number of classes) squared prompts, correct answers are balanced
        over labels and classes. A query never appears among its demonstrations. Of a task of
        pairs, each demonstration's output is its label, and `labels` are "right", "wrong",
        "wrong 2", ...

    Raises
    ------
    InputError
        If labels are not distinct, one per class and the same tokens after every prompt; if
        only some labels are class names and `permute_labels` is not given; if a class has too
        few texts; if the tokenizer drops or does not know a character; if a prompt is longer than
        the model's context; or if an argument does not apply to the kind of task.
    """
    if not hasattr(model, "max_positions"):
        check_is(model, "Model", "model")
    if not isinstance(task, PairTask):
        check_is(task, "Task", "task")
    for name, flag in (
        ("shared_demonstrations", shared_demonstrations),
        ("add_special_tokens", add_special_tokens),
        ("control_tokens", control_tokens),
    ):
        yes_or_no(name, flag)
    whole("n", n, 1, MOST_PROMPTS)
    whole("seed", seed)
    form = make_template(template, instruction, model.tokenizer)
    add_special_tokens = bool(add_special_tokens) and not isinstance(form, ChatTemplate)
    if isinstance(task, PairTask):
        given = {
            "labels": labels is not None,
            "order": order != "shuffled",
            "permute_labels": permute_labels is not None,
            "shared_demonstrations": shared_demonstrations,
        }
        for name, used in given.items():
            if used:
                raise InputError(f"{name}= needs a task of classes; {task.name!r} is one of pairs")
        pairs = PairRecipe(
            task,
            whole("shots", shots),
            seed,
            form,
            whole("wrong", wrong),
            scoring,
            model.max_positions,
            add_special_tokens,
            bool(control_tokens),
        )
        pairs.check_pairs()
        return pairs.make(n, model.tokenizer)
    if whole("wrong", wrong) != 1:
        raise InputError(f"wrong= needs a task of pairs; {task.name!r} is one of classes")
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
    one_of("order", order, ORDERS)
    recipe = TaskRecipe(
        task,
        labels,
        shots,
        seed,
        form,
        order,
        permuted,
        shared_demonstrations,
        model.max_positions,
        add_special_tokens,
        bool(control_tokens),
        scoring,
    )
    recipe.check_texts()
    return recipe.make(n, model.tokenizer)
