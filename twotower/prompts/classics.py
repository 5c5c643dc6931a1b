"""Three well-known tasks with a right and a wrong answer: generated prompts and corrupted partners.

Prompt i is drawn from the seed and its number i only. Blocks of prompts are balanced: each block
holds every combination of what could give the answer away (such as the order of the names) once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from string import Formatter
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from ..checks import MOST_PROMPTS, check_is, one_of, whole, yes_or_no
from ..errors import InputError
from .contrast import contrast
from .prompts import Prompts
from .tokens import encode

if TYPE_CHECKING:
    from .model import LoadedModel

T = TypeVar("T")

NAMES = (
    "Mary John Tom James Dan Martin Amy Alice Peter Paul Mark Anna Sarah Laura Kate Emma Jack "
    "David Robert Michael Daniel George Henry Simon Adam Andrew Alex Anne Jane Julia Lisa Maria "
    "Lucy Susan Helen Grace Rachel Victoria Emily Linda Karen Nancy Steven Brian Kevin Eric Jason "
    "Ryan Scott Frank Richard Thomas William Charles Edward Arthur Joseph Samuel Matthew Luke"
).split()
PLACES = (
    "store park school garden restaurant hospital office library station market beach museum "
    "house theater church farm hotel river airport gym"
).split()
OBJECTS = (
    "drink book ring ball letter computer necklace kiss key flower pen ticket gift map cup picture "
    "snack phone bag hat coat basket card cookie"
).split()
INDIRECT_OBJECT_TEMPLATES = (
    "When {A} and {B} went to the {place}, {S2} gave a {object} to",
    "After {A} and {B} went to the {place}, {S2} gave a {object} to",
    "Then, {A} and {B} went to the {place}. {S2} gave a {object} to",
    "Then, {A} and {B} had a long argument at the {place}. Afterwards {S2} handed a {object} to",
    "While {A} and {B} were working at the {place}, {S2} gave a {object} to",
    "Yesterday {A} and {B} met at the {place}, and {S2} passed a {object} to",
    "Last week {A} and {B} had lots of fun at the {place}, and {S2} brought a {object} to",
    "As soon as {A} and {B} got to the {place}, {S2} offered a {object} to",
)

EVENTS = (
    "war siege strike conflict rebellion famine drought epidemic crisis campaign alliance "
    "expedition exploration voyage dynasty empire reign dispute feud truce treaty project "
    "construction debate investigation occupation partnership program reform revolution uprising "
    "settlement struggle trial tour blockade boycott ban cooperation decline expansion invasion "
    "journey marriage mission negotiation operation partition persecution pilgrimage plague "
    "protest quarantine raid regime renovation research study tradition trade"
).split()
CENTURIES = tuple(str(century) for century in range(11, 19))

PEOPLE = (
    "author authors|doctor doctors|teacher teachers|student students|farmer farmers|"
    "lawyer lawyers|manager managers|driver drivers|painter painters|pilot pilots|singer singers|"
    "boy boys|girl girls|brother brothers|sister sisters|friend friends|king kings|guard guards|"
    "dancer dancers|actor actors|judge judges|player players|writer writers|man men|woman women|"
    "policeman policemen|fireman firemen|gentleman gentlemen|salesman salesmen|"
    "fisherman fishermen|businessman businessmen|sportsman sportsmen"
)
THINGS = (
    "key keys|door doors|book books|letter letters|picture pictures|tree trees|car cars|"
    "table tables|chair chairs|box boxes|ship ships|bridge bridges|flower flowers|goose geese"
)
NEAR_TEMPLATES = (
    "The {subject} near the {attractor} certainly",
    "The {subject} behind the {attractor} probably",
    "The {subject} next to the {attractor} still",
    "The {subject} in front of the {attractor} really",
)
CLAUSE_TEMPLATES = (
    "The {subject} that the {attractor} noticed",
    "The {subject} that the {attractor} ignored",
    "The {subject} that the {attractor} liked",
)
"""Templates whose attractor must be a person."""

VERBS = ((" is", " are"), (" was", " were"), (" has", " have"))

FEWEST, MANY = 5, 20
"""Fewest names and nouns that a tokenizer must leave; fewest years, and names of one length."""


@dataclass(frozen=True)
class _Item:
    """A form, its words in the clean prompt and in the corrupted one, and the answers.

    Words named in `marked` are spans.
    """

    form: str
    clean: dict[str, str]
    corrupted: dict[str, str]
    marked: tuple[str, ...]
    right: str
    wrong: str


def classic_prompts(
    model: LoadedModel,
    name: str,
    n: int = 40,
    seed: int = 0,
    *,
    corrupted: bool = False,
) -> Prompts:
    """Make prompts of a well-known task, or their corrupted partners.

    Parameters
    ----------
    model
        Model that gives the tokenizer and the context length.
    name
        "indirect-object": "When Mary and John went to the store, John gave a drink to", right
        " Mary", wrong " John" [1]_. Half of the prompts name the indirect object first (ABBA),
        half the subject (BABA). Every name is equally often right and wrong. Spans: "IO", the
        indirect object; "S1" and "S2", the subject. All names have the same number of tokens,
        one if possible. Corrupted: three other names (ABC).

        "greater-than": "The war lasted from the year 1732 to the year 17", right a later year of
        the century ("58"), wrong an earlier one ("09") [2]_. Spans: "noun", "XX" (the start
        year's century) and "YY" (its last two digits). If the tokenizer splits numbers into
        digits, answers have two tokens. Corrupted: a start year that ends in "01", after which
        both answers are possible.

        "agreement": "The keys near the cabinet certainly", right " are", wrong " is" [3]_, [4]_.
        Each combination of a singular or plural subject with a singular or plural attractor is
        equally frequent. Spans: "subject" and "attractor", the noun in between. Corrupted: the
        subject in the other number, which makes the wrong answer right.
    n
        Number of prompts.
    seed
        Seed of all draws. Prompt i is the same for every n > i.
    corrupted
        Whether to return the corrupted partner of each prompt, with the clean prompt's answers.
        A prompt and its partner have the same roles at the same positions and differ only in the
        tokens named above.

    Returns
    -------
    Prompts
        Their `labels` are "right" and "wrong". The last position, called END in [1]_, has the
        role "last".

    Raises
    ------
    InputError
        If the name is unknown, n is out of range, or the tokenizer leaves too few names, years or
        nouns, because prompts and partners must align token by token.

    References
    ----------
    .. [1] Wang et al. 2022, Interpretability in the Wild: a Circuit for Indirect Object
       Identification in GPT-2 small, arXiv 2211.00593.
    .. [2] Hanna et al. 2023, How does GPT-2 compute greater-than?, arXiv 2305.00586.
    .. [3] Linzen et al. 2016, Assessing the Ability of LSTMs to Learn Syntax-Sensitive
       Dependencies, arXiv 1611.01368.
    .. [4] Finlayson et al. 2021, Causal Analysis of Syntactic Agreement Mechanisms in Neural
       Language Models, arXiv 2106.06087.

    Examples
    --------
    >>> clean = classic_prompts(model, "indirect-object", n=20)
    >>> partners = classic_prompts(model, "indirect-object", n=20, corrupted=True)
    >>> effects = head_effects(model, clean, to=From(partners))
    """
    if not hasattr(model, "max_positions"):
        check_is(model, "Model", "model")
    one_of("name", name, CLASSICS)
    whole("n", n, 1, MOST_PROMPTS)
    whole("seed", seed)
    yes_or_no("corrupted", corrupted)
    items = CLASSICS[name](model.tokenizer, int(n), int(seed))
    clean, partners = (
        contrast(
            model,
            [text for text, _ in filled],
            [item.right for item in items],
            [item.wrong for item in items],
            [spans for _, spans in filled],
            join="",
        )
        for filled in (
            [_filled(item.form, item.clean, item.marked) for item in items],
            [_filled(item.form, item.corrupted, item.marked) for item in items],
        )
    )
    if not np.array_equal(clean.role, partners.role):
        raise InputError(
            f"{name}: with this tokenizer prompts and their corrupted partners do not align, token "
            "by token"
        )
    return replace(partners if corrupted else clean, task_name=name, seed=int(seed))


def _indirect_object(tokenizer: Any, n: int, seed: int) -> list[_Item]:
    """Make prompts of the indirect object."""
    names = _of_one_length(tokenizer, NAMES)
    if len(names) < FEWEST:
        raise InputError(
            f"indirect-object needs {FEWEST} names with as many tokens; this tokenizer leaves "
            f"{len(names)}"
        )
    items = []
    for i in range(n):
        abba = _queued([seed, 31], i, 2) == 0
        # In a block of as many prompts as names each name is right once and wrong once.
        block, place = divmod(i, len(names))
        rng = np.random.default_rng([seed, 32, block])
        queue, step = rng.permutation(len(names)), int(rng.integers(1, len(names)))
        asked, subject = int(queue[place]), int(queue[(place + step) % len(names)])
        rng = np.random.default_rng([seed, 33, i])
        free = [name for k, name in enumerate(names) if k not in (asked, subject)]
        others = [free[k] for k in rng.permutation(len(free))[:3]]
        form = _drawn(rng, INDIRECT_OBJECT_TEMPLATES)
        order = ("IO", "S1") if abba else ("S1", "IO")
        for letter, role in zip("AB", order, strict=True):
            form = form.replace(f"{{{letter}}}", f"{{{role}}}")
        about = {"place": _drawn(rng, PLACES), "object": _drawn(rng, OBJECTS)}
        io, s = names[asked], names[subject]
        roles = ("IO", "S1", "S2")
        clean, corrupted = (
            about | dict(zip(roles, own, strict=True)) for own in ((io, s, s), others)
        )
        items.append(_Item(form, clean, corrupted, roles, f" {io}", f" {s}"))
    return items


def _greater_than(tokenizer: Any, n: int, seed: int) -> list[_Item]:
    """Make prompts of two years of a century."""
    known = {century: _years(tokenizer, century) for century in CENTURIES}
    centuries = [century for century in CENTURIES if len(known[century]) >= MANY]
    if not centuries:
        raise InputError(
            "greater-than needs years whose first two digits end a token; this tokenizer leaves "
            f"fewer than {MANY} in each century"
        )
    items = []
    for i in range(n):
        # Each block of four takes a start year from each quarter of the century.
        quarter = _queued([seed, 41], i, 4)
        noun = EVENTS[_queued([seed, 42], i, len(EVENTS))]
        rng = np.random.default_rng([seed, 43, i])
        century = _drawn(rng, centuries)
        years = known[century]
        start = int(rng.choice(np.array_split(np.arange(1, len(years) - 1), 4)[quarter]))
        right = years[int(rng.integers(start + 1, len(years)))]
        wrong = years[int(rng.integers(0, start))]
        form = f"The {{noun}} lasted from the year {{XX}}{{YY}} to the year {century}"
        clean = {"noun": noun, "XX": century, "YY": years[start]}
        items.append(_Item(form, clean, clean | {"YY": "01"}, tuple(clean), right, wrong))
    return items


def _agreement(tokenizer: Any, n: int, seed: int) -> list[_Item]:
    """Make prompts of subjects and attractors."""
    people, things = ([noun.split() for noun in nouns.split("|")] for nouns in (PEOPLE, THINGS))
    subjects = [noun for noun in people + things if len(set(_lengths(tokenizer, noun))) == 1]
    if len(subjects) < FEWEST:
        raise InputError(
            f"agreement needs {FEWEST} nouns whose plurals have as many tokens as their "
            f"singulars; this tokenizer leaves {len(subjects)}"
        )
    items = []
    for i in range(n):
        number, attractor_number = divmod(_queued([seed, 51], i, 4), 2)
        subject = subjects[_queued([seed, 52], i, len(subjects))]
        rng = np.random.default_rng([seed, 53, i])
        form = _drawn(rng, NEAR_TEMPLATES + CLAUSE_TEMPLATES)
        nouns = people if form in CLAUSE_TEMPLATES else people + things
        attractor = _drawn(rng, [noun for noun in nouns if noun != subject])
        verbs = _drawn(rng, VERBS)
        clean, corrupted = (
            {"subject": subject[own], "attractor": attractor[attractor_number]}
            for own in (number, 1 - number)
        )
        items.append(_Item(form, clean, corrupted, tuple(clean), verbs[number], verbs[1 - number]))
    return items


CLASSICS: dict[str, Callable[[Any, int, int], list[_Item]]] = {
    "indirect-object": _indirect_object,
    "greater-than": _greater_than,
    "agreement": _agreement,
}
"""Makers of prompts from a tokenizer, a number and a seed, by name."""


def _filled(
    form: str, words: dict[str, str], marked: Sequence[str]
) -> tuple[str, dict[str, tuple[int, int]]]:
    """Return a form with its words, and the spans of the marked ones in characters."""
    text, spans = "", {}
    for before, name, _, _ in Formatter().parse(form):
        text += before
        if name is None:
            continue
        if name in marked:
            spans[name] = (len(text), len(text) + len(words[name]))
        text += words[name]
    return text, spans


def _queued(key: Sequence[int], i: int, size: int) -> int:
    """Return number i of a queue of permutations of `size` numbers."""
    block, place = divmod(i, size)
    return int(np.random.default_rng([*key, block]).permutation(size)[place])


def _drawn(rng: np.random.Generator, known: Sequence[T]) -> T:
    """Return one of several values, drawn at random."""
    return known[int(rng.integers(len(known)))]


def _lengths(tokenizer: Any, words: Sequence[str]) -> list[int]:
    """Return the number of tokens of words inside a text."""
    texts = ["The of", *(f"The {word} of" for word in words)]
    around, *found = map(len, encode(texts, tokenizer, add_special_tokens=False))
    return [length - around for length in found]


def _of_one_length(tokenizer: Any, words: Sequence[str]) -> list[str]:
    """Return the words of the smallest number of tokens that many have, or the most frequent."""
    groups: dict[int, list[str]] = {}
    for word, length in zip(words, _lengths(tokenizer, words), strict=True):
        groups.setdefault(length, []).append(word)
    many = [groups[length] for length in sorted(groups) if len(groups[length]) >= MANY]
    return many[0] if many else max(groups.values(), key=len)


def _years(tokenizer: Any, century: str) -> list[str]:
    """Return the last two digits of a century's years, from "02", that are tokens of their own.

    All have as many tokens as "01", which takes the start year's place in corrupted prompts.
    """
    years = [f"{year:02}" for year in range(1, 100)]
    texts = [f"year {century}", *(f"year {century}{year}" for year in years)]
    before, *found = encode(texts, tokenizer, add_special_tokens=False)
    return [
        year
        for year, ids in zip(years[1:], found[1:], strict=True)
        if all(own[: len(before)] == before for own in (ids, found[0]))
        and len(ids) == len(found[0])
    ]
