"""Few-shot prompts of pairs: demonstrations "input: output", and an input whose output is asked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..errors import InputError
from .chat import ChatTemplate
from .pair_task import PairTask
from .prompts import Prompts, assemble
from .segments import Prompt, Template
from .tokens import encode


@dataclass(frozen=True)
class PairRecipe:
    """All settings of a set of prompts of pairs, except their number and the tokenizer."""

    task: PairTask
    shots: int
    seed: int
    template: Template | ChatTemplate
    wrong: int
    scoring: str
    max_positions: int | None
    add_special_tokens: bool = True
    control_tokens: bool = False
    part: str = ""
    """Part of the task's pairs, after a split."""

    def describe(self) -> dict[str, Any]:
        """Return the arguments of `build_prompts`, for the provenance."""
        return {
            "shots": self.shots,
            "template": self.template.form,
            "instruction": self.template.instruction,
            "wrong": self.wrong,
            "scoring": self.scoring,
            "add_special_tokens": self.add_special_tokens,
            "control_tokens": self.control_tokens,
            "part": self.part,
        }

    def check_pairs(self) -> None:
        """Check that there are enough pairs for the demonstrations and the wrong answers."""
        n, outputs = len(self.task.pairs), {output for _, output in self.task.pairs}
        if n < self.shots + 1:
            raise InputError(
                f"{self.task.name!r} has {n} pairs here, and {self.shots} shots and a query need "
                f"{self.shots + 1}; give more pairs or fewer shots"
            )
        if len(outputs) < self.wrong + 1:
            raise InputError(
                f"{self.task.name!r} has {len(outputs)} different outputs here, and a right "
                f"answer with wrong={self.wrong} needs {self.wrong + 1}"
            )

    def make(self, n: int, tokenizer: Any) -> Prompts:
        """Make the first n prompts."""
        order = np.random.default_rng([self.seed, 21]).permutation(len(self.task.pairs))
        names = ["right", "wrong", *(f"wrong {k}" for k in range(2, self.wrong + 1))]
        rivals = self._rivals(tokenizer)
        queue = [k for k in map(int, order) if len(rivals[self.task.pairs[k][1]]) >= self.wrong]
        if not queue:
            raise InputError(
                f"no output of {self.task.name!r} has {self.wrong} others of as many tokens with "
                "another first token, and scoring='first' compares no others: use scoring='sum', "
                "'mean' or 'characters'"
            )
        return assemble(
            [self._prompt(i, queue[i % len(queue)], rivals) for i in range(n)],
            names[: 1 + self.wrong],
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
        """Make prompts from two parts of the task's pairs."""
        halves = self.task.split(fraction, seed)
        first, second = (
            replace(self, task=half, part=f"{self.part}split({fraction}, {seed})[{number}]")
            for number, half in enumerate(halves)
        )
        for part in (first, second):
            part.check_pairs()
        return first.make(n_first, tokenizer), second.make(n_second, tokenizer)

    def _rivals(self, tokenizer: Any) -> dict[str, list[str]]:
        """Return the outputs that may be wrong answers beside each output.

        First tokens are compared only if they differ, and the answers have as many tokens.
        """
        outputs = sorted({output for _, output in self.task.pairs})
        if self.scoring != "first":
            return {own: [x for x in outputs if x != own] for own in outputs}
        asked = self.template.prompt([], self.task.pairs[0][0], "", "right").string
        texts = [asked, *(asked + self.template.gap + output for output in outputs)]
        before, *coded = encode(texts, tokenizer, self.add_special_tokens)
        tails = {x: ids[len(before) :] for x, ids in zip(outputs, coded, strict=True)}

        def comparable(one: list[int], other: list[int]) -> bool:
            return len(one) == len(other) and one[:1] != other[:1]

        return {
            own: [x for x in outputs if x != own and comparable(tails[x], tails[own])]
            for own in outputs
        }

    def _prompt(self, i: int, query: int, rivals: Mapping[str, list[str]]) -> Prompt:
        """Make prompt i, which asks about pair `query`."""
        pairs, rng = self.task.pairs, np.random.default_rng([self.seed, 22, i])
        free = [k for k in range(len(pairs)) if k != query]
        shown = [pairs[k] for k in rng.permutation(free)[: self.shots]]
        text, right = pairs[query]
        others = rivals[right]
        wrong = [others[k] for k in rng.permutation(len(others))[: self.wrong]]
        demonstrations = [(given, "", output) for given, output in shown]
        made = self.template.prompt(demonstrations, text, "", "right")
        answers = tuple(self.template.gap + answer for answer in (right, *wrong))
        return replace(made, answers=answers)
