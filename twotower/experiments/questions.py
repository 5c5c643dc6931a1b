"""Questions of several forms: labels, word pairs, completions, and the classics.

Every question has sets of prompts with a right answer and wrong ones, so effects on the margin can
be compared across forms. In completions the answer follows a middle word ("lion: animal, foo"),
and heads are changed wherever a token of the completion is predicted, as in `trace_effects`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..head import Head
from ..measures.analyze import analyze
from ..measures.effects import Effects
from ..measures.head_kinds import KINDS, head_kinds
from ..prompts import (
    PairTask,
    Prompts,
    build_prompts,
    classic_prompts,
    contrast,
    load_pairs,
    load_task,
)
from ..prompts.tokens import CANDIDATE_LABELS, encode
from ..results import Variable, save
from ..results import open as open_run
from .experiment import Setting, short_hash
from .parts import SENTENCE_SHOTS, answers_of, some, variable

if TYPE_CHECKING:
    import xarray as xr

CLASSIFICATION, PAIRS, COMPLETIONS, CLASSICS = (
    "classification",
    "pairs",
    "completions",
    "classics",
)
TASKS = ("word-fields", "topic")
"""Tasks of classification beside the experiment's own."""
PAIR_TASKS = (
    "opposites",
    "past-tenses",
    "nationalities",
    "plurals",
    "next-items",
    "first-letters",
)
CLASS_CHAIN, LETTER_CHAIN, COUNTRY_CHAIN = (
    "class, then label",
    "opposite, then its first letter",
    "country, then its people",
)
CHAINS = (CLASS_CHAIN, LETTER_CHAIN, COUNTRY_CHAIN)
CLASSIC_TASKS = ("indirect-object", "greater-than", "agreement")
SHOTS = 8
"""Demonstrations of a prompt of pairs or completions."""
WRONG = 3
"""Wrong answers of a pair or a completion, where there are as many."""


def questions(setting: Setting) -> dict[str, str]:
    """Return the form of every question, by name; fewer for small sizes."""
    forms = {
        CLASSIFICATION: [
            setting.task.name,
            *(name for name in some(TASKS, setting.size) if name != setting.task.name),
        ],
        PAIRS: some(PAIR_TASKS, setting.size),
        COMPLETIONS: some(CHAINS, setting.size),
        CLASSICS: some(CLASSIC_TASKS, setting.size),
    }
    return {name: form for form, names in forms.items() for name in names}


def halves(setting: Setting, name: str, n: int) -> tuple[Prompts, Prompts]:
    """Return two sets of n prompts of a question.

    The sets share no text, except those of classics, which are different prompts of one generator.
    With the same seed, the first prompts are the same for every n.
    """
    model, seed = setting.model, setting.seed
    if name in CLASSIC_TASKS:
        sets = [classic_prompts(model, name, n=n, seed=2 * seed + half) for half in range(2)]
        return sets[0], sets[1]
    if name in CHAINS:
        first, second = (_chained(setting, name, part, n) for part in _chains(setting, name))
        return first, second
    if name in PAIR_TASKS:
        pairs = _short(model.tokenizer, load_pairs(name))
        shots = min(SHOTS, setting.size.shots)
        prompts = build_prompts(model, pairs, n=2 * n, shots=shots, wrong=WRONG, seed=seed)
    else:
        own = name == setting.task.name
        task = setting.task if own else load_task(name)
        shots = setting.size.shots if own else min(SENTENCE_SHOTS, setting.size.shots)
        prompts = build_prompts(model, task, n=2 * n, shots=shots, seed=seed)
    return prompts.split(0.5, seed=seed)


def where(name: str, prompts: Prompts) -> Any:
    """Return the positions at which a question's heads are changed in sweeps."""
    if name not in CHAINS:
        return "last"
    of_completion = (prompts.role == "completion") | (prompts.role == "last")
    before: np.ndarray = np.roll(of_completion, -1, axis=1)
    return of_completion | before


def sweep(setting: Setting, name: str, prompts: Prompts) -> xr.DataTree:
    """Return predictions and every head's effect on the margin, measured once for all experiments.

    Parameters
    ----------
    setting
        Its folder keeps the result.
    name
        The question.
    prompts
        Prompts of the question.
    """

    def measure() -> xr.DataTree:
        with setting.stage(f"{name}: sweeping every head"):
            effects = Effects(positions=where(name, prompts), logprobs=False)
            return analyze(setting.model, prompts, measures=["predictions", effects])

    return _kept(setting, ["sweep", name, prompts.hash], measure)


def kinds(setting: Setting, prompts: Prompts) -> xr.Dataset:
    """Return the kinds of heads, with the scores of a task's prompts, measured once."""

    def measure() -> xr.Dataset:
        with setting.stage("kinds of heads"):
            return head_kinds(setting.model, prompts, n=8, seed=setting.seed)

    run = _kept(setting, ["kinds", setting.seed, prompts.hash], measure)
    return run["kinds"].to_dataset()


def kinds_of(runs: Sequence[xr.DataTree]) -> dict[Head, list[str]]:
    """Kinds of every head: those that it has in more than half of the seeds."""
    named = [variable(run, "kinds", "kind").values for run in runs]
    return {
        Head(*place): [
            kind
            for kind in KINDS
            if sum(kind in str(own[place]).split(", ") for own in named) > len(runs) / 2
        ]
        for place in np.ndindex(named[0].shape)
    }


def _kept(
    setting: Setting, about: Sequence[Any], measure: Callable[[], xr.DataTree | xr.Dataset]
) -> xr.DataTree:
    """Measure, or open from the folder what was measured with the same settings."""
    model = setting.model
    known = [model.name, model.revision, model.quantization, str(model.dtype), *about]
    path: Path = setting.folder / f"{about[0]}-{short_hash(known)}.zarr"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        save(measure(), path, overwrite=True)
    return open_run(path).load()


def _short(tokenizer: Any, task: PairTask) -> PairTask:
    """Return a task with the pairs whose output is one token, if most are."""
    kept = [pair for pair, one in zip(task.pairs, _one_token(tokenizer, task), strict=True) if one]
    return replace(task, pairs=tuple(kept)) if 2 * len(kept) > len(task.pairs) else task


def _one_token(tokenizer: Any, task: PairTask) -> list[bool]:
    """Return for each pair whether its output is one token."""
    base, *coded = encode([":", *(f": {output}" for _, output in task.pairs)], tokenizer, False)
    return [len(ids) == len(base) + 1 for ids in coded]


def answers_table(
    setting: Setting,
    asked: Mapping[str, str],
    arrays: Mapping[str, np.ndarray],
    conditions: Sequence[str],
    fitted: np.ndarray,
    n_answers: Sequence[int],
    hashes: Mapping[str, Sequence[str]],
    about: str,
) -> xr.Dataset:
    """Return the answers of every question under several conditions.

    Parameters
    ----------
    setting
        Setting of the experiment.
    asked
        Form of every question, by name.
    arrays
        (task, condition, prompt) measures of `parts.answers_of`, by name.
    conditions
        Names of the conditions.
    fitted
        (task, fit_prompt) whether the answers to the prompts on which heads were chosen are right.
    n_answers
        Number of answers of each question.
    hashes
        Hashes of each question's prompts.
    about
        Description of the conditions.
    """
    edited = answers_of(("task", "condition", "prompt"), about)
    of_fit, of_task = ("task", "fit_prompt"), ("task",)
    return setting.table(
        {
            **{name: (edited[name], values) for name, values in arrays.items()},
            "correct_fit": (
                Variable(of_fit, "float", "right among the answers", "choosing prompts"),
                fitted,
            ),
            "n_classes": (
                Variable(of_task, "int", "answers", "number of answers compared"),
                np.array(n_answers),
            ),
            "form": (
                Variable(of_task, "str", "form", "form of the question"),
                np.array(list(asked.values()), dtype=object),
            ),
        },
        {
            "task": list(asked),
            "condition": list(conditions),
            "prompt": np.arange(next(iter(arrays.values())).shape[-1]),
            "fit_prompt": np.arange(fitted.shape[-1]),
        },
        prompts_of_tasks=hashes,
    )


# ---- completions --------------------------------------------------------------------------


@dataclass(frozen=True)
class _Chain:
    """Middle words by input, and the answer to a middle word in a prompt given by number."""

    middle: Mapping[str, str]
    answer: Callable[[str, int], str]


def _chains(setting: Setting, name: str) -> tuple[_Chain, _Chain]:
    """Return a chain's two parts, which share no input."""
    seed = setting.seed
    if name == CLASS_CHAIN:
        classes = list(setting.task.classes)
        labels = [label for label in CANDIDATE_LABELS if label not in classes][: len(classes)]

        def label(middle: str, i: int) -> str:
            # Every class has every label equally often.
            return labels[(classes.index(middle) + i // len(classes)) % len(classes)]

        tasks = setting.task.split(0.5, seed)
        return (
            _Chain({text: c for c, texts in tasks[0].texts.items() for text in texts}, label),
            _Chain({text: c for c, texts in tasks[1].texts.items() for text in texts}, label),
        )
    if name == LETTER_CHAIN:
        pairs = load_pairs("opposites")

        def answer(middle: str, i: int) -> str:
            return middle[0]
    else:
        people = dict(_short(setting.model.tokenizer, load_pairs("nationalities")).pairs)
        capitals = load_pairs("capitals").pairs
        pairs = PairTask(name, [(city, land) for land, city in capitals if land in people])

        def answer(middle: str, i: int) -> str:
            return people[middle]

    parts = pairs.split(0.5, seed)
    return _Chain(dict(parts[0].pairs), answer), _Chain(dict(parts[1].pairs), answer)


def _chained(setting: Setting, name: str, chain: _Chain, n: int) -> Prompts:
    """Return prompts "input: middle, answer", the last one with its middle and without answer."""
    texts, right, wrong, spans = [], [], [], []
    queue = _in_turn(chain.middle, np.random.default_rng([setting.seed, 61]))
    for i in range(n):
        query = queue[i % len(queue)]
        rng = np.random.default_rng([setting.seed, 62, i])
        asked = chain.answer(chain.middle[query], i)
        shown = _in_turn({x: m for x, m in chain.middle.items() if x != query}, rng)
        shown = shown[: min(SHOTS, 2 * setting.size.shots)]
        lines = [
            f"{shown[k]}: {chain.middle[shown[k]]}, {chain.answer(chain.middle[shown[k]], i)}\n"
            for k in rng.permutation(len(shown))
        ]
        others = sorted({chain.answer(middle, i) for middle in chain.middle.values()} - {asked})
        start = "".join(lines) + f"{query}:"
        texts.append(f"{start} {chain.middle[query]},")
        spans.append({"completion": (len(start), len(texts[-1]))})
        right.append(asked)
        wrong.append([others[k] for k in rng.permutation(len(others))[:WRONG]])
    prompts = contrast(setting.model, texts, right, wrong, spans, join=" ")
    return replace(prompts, task_name=name, seed=setting.seed)


def _in_turn(middle: Mapping[str, str], rng: np.random.Generator) -> list[str]:
    """Return the inputs in random order, those of each middle word in turn."""
    inputs = list(middle)
    order = [inputs[k] for k in rng.permutation(len(inputs))]
    seen: dict[str, int] = {}
    turn = {}
    for text in order:
        turn[text] = seen[middle[text]] = seen.get(middle[text], -1) + 1
    return sorted(order, key=turn.__getitem__)
