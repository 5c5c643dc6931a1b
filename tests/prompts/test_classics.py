"""Prompts of well-known tasks: what they say, how they balance, and their corrupted partners."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

import numpy as np
import pytest
from tiny import byte_level, sentencepiece, taking
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import twotower as tt
from twotower.prompts import classic_prompts
from twotower.prompts.classics import CLASSICS

MODELS = {
    "bytes": taking(byte_level()),
    "bytes with BOS": taking(byte_level(bos=True)),
    "sentencepiece": taking(sentencepiece()),
}
MODEL: Any = MODELS["bytes"]
SPANS = {
    "indirect-object": {"IO", "S1", "S2"},
    "greater-than": {"noun", "XX", "YY"},
    "agreement": {"subject", "attractor"},
}
CHANGED = {"indirect-object": {"IO", "S1", "S2"}, "greater-than": {"YY"}, "agreement": {"subject"}}


def words(prompts: tt.Prompts, i: int) -> dict[str, str]:
    """Words of the spans of a prompt."""
    return {s.role: s.text for s in prompts.items[i].segments if s.role != "text"}


def answers(prompts: tt.Prompts, i: int) -> tuple[str, str]:
    right, wrong = (text.strip() for text in prompts.answers.text[i])
    return right, wrong


# ---- every task --------------------------------------------------------------------


def test_the_tasks() -> None:
    assert set(CLASSICS) == set(SPANS)


@pytest.mark.parametrize("tokenizer", MODELS)
@pytest.mark.parametrize("name", SPANS)
def test_prompts_align_with_their_partners(name: str, tokenizer: str) -> None:
    model: Any = MODELS[tokenizer]
    clean, partners = (
        classic_prompts(model, name, n=12, seed=3, corrupted=corrupted)
        for corrupted in (False, True)
    )
    assert clean.labels == partners.labels == ("right", "wrong")
    assert (clean.task_name, clean.seed) == (name, 3)
    assert set(clean.gold) == {"right"}
    for prompts in (clean, partners):
        for roles in prompts.role:
            assert SPANS[name] < set(roles)
            assert roles[-1] == "last"
    assert np.array_equal(clean.role, partners.role)
    assert np.array_equal(clean.answers.token_id, partners.answers.token_id)
    differs = clean.token_id != partners.token_id
    assert differs.any(axis=1).all()
    assert set(clean.role[differs]) <= CHANGED[name]


@pytest.mark.parametrize("name", SPANS)
def test_a_prompt_depends_only_on_the_seed_and_its_number(name: str) -> None:
    many, few = (classic_prompts(MODEL, name, n=n, seed=1) for n in (25, 6))
    assert many[:6].hash == few.hash
    assert many.strings[:6] == few.strings
    assert len(set(many.strings)) == 25
    assert classic_prompts(MODEL, name, n=6, seed=2).strings != few.strings


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "nonsense"}, "use one of indirect-object, greater-than, agreement"),
        ({"name": "agreement", "n": 0}, "n=0 must be a whole number, from 1 to"),
        ({"name": "agreement", "n": 10**9}, "must be a whole number, from 1 to"),
        ({"name": "agreement", "seed": -1}, "seed=-1 must be a whole number"),
        ({"name": "agreement", "corrupted": "yes"}, "corrupted='yes' must be True or False"),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(tt.errors.InputError, match=message):
        classic_prompts(MODEL, **arguments)
    with pytest.raises(tt.errors.InputError, match="model must be the result of load"):
        classic_prompts("smollm2-135m", "agreement")  # type: ignore[arg-type]


# ---- the indirect object -----------------------------------------------------------


def test_the_indirect_object_is_right_and_the_subject_wrong() -> None:
    prompts = classic_prompts(MODEL, "indirect-object", n=20)
    partners = classic_prompts(MODEL, "indirect-object", n=20, corrupted=True)
    for i in range(20):
        told = words(prompts, i)
        assert (told["IO"], told["S1"]) == answers(prompts, i)
        assert told["S1"] == told["S2"] != told["IO"]
        assert prompts.strings[i].count(told["S1"]) == 2
        others = words(partners, i)
        assert len({*others.values(), *told.values()}) == 5
    roles = [list(words(prompts, i)) for i in range(20)]
    assert {own[-1] for own in roles} == {"S2"}
    for start in range(0, 20, 2):
        assert {own[0] for own in roles[start : start + 2]} == {"IO", "S1"}


def test_every_name_is_equally_often_right_and_wrong() -> None:
    most = 200
    prompts = classic_prompts(MODEL, "indirect-object", n=most)
    right = [answers(prompts, i)[0] for i in range(most)]
    names = len(set(right))
    assert names >= 5
    for start in range(0, most - names + 1, names):
        block = [answers(prompts, i) for i in range(start, start + names)]
        assert len({one for one, _ in block}) == len({other for _, other in block}) == names


# ---- years -------------------------------------------------------------------------


def test_the_right_year_is_later_and_the_wrong_one_earlier() -> None:
    prompts = classic_prompts(MODEL, "greater-than", n=40)
    partners = classic_prompts(MODEL, "greater-than", n=40, corrupted=True)
    starts = []
    for i, string in enumerate(prompts.strings):
        found = re.fullmatch(r"The (\w+) lasted from the year (\d\d)(\d\d) to the year \2", string)
        assert found
        assert words(prompts, i) == dict(zip(("noun", "XX", "YY"), found.groups(), strict=True))
        right, wrong = map(int, answers(prompts, i))
        starts.append(int(found[3]))
        assert 1 < wrong < starts[-1] < right < 100
        assert words(partners, i) == words(prompts, i) | {"YY": "01"}
    for start in range(0, 40, 4):  # one of each quarter of the century
        quarters = Counter(min((year - 3) // 24, 3) for year in starts[start : start + 4])
        assert set(quarters.values()) == {1}


def test_answers_of_several_digits_are_several_tokens() -> None:
    prompts = classic_prompts(MODEL, "greater-than", n=4)
    assert (prompts.answers.n_tokens == 2).all()


# ---- agreement ---------------------------------------------------------------------

PLURAL = {"are", "were", "have"}


def is_plural(noun: str) -> bool:
    return noun.endswith(("s", "men", "geese"))


def test_the_right_verb_has_the_number_of_the_subject() -> None:
    prompts = classic_prompts(MODEL, "agreement", n=40)
    partners = classic_prompts(MODEL, "agreement", n=40, corrupted=True)
    numbers = []
    for i in range(40):
        told, other = words(prompts, i), words(partners, i)
        right, wrong = answers(prompts, i)
        assert (right in PLURAL) == is_plural(told["subject"]) != is_plural(other["subject"])
        assert (right in PLURAL) != (wrong in PLURAL)
        assert told["attractor"] == other["attractor"]
        assert told["subject"] != told["attractor"]
        numbers.append((is_plural(told["subject"]), is_plural(told["attractor"])))
    for start in range(0, 40, 4):
        assert len(set(numbers[start : start + 4])) == 4


# ---- tokenizers that do not fit ----------------------------------------------------


def in_pieces(pattern: str) -> Any:
    """A stand-in for a model whose tokens are the matches of a pattern; it knows numbers."""
    known = {word: k for k, word in enumerate(["<unk>", *map(str, range(1000))])}
    tokenizer = Tokenizer(models.WordLevel(known, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), "isolated")
    return taking(PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>"))


def test_years_in_tokens_of_three_digits() -> None:
    with pytest.raises(tt.errors.InputError, match="needs years whose first two digits end a tok"):
        classic_prompts(in_pieces(r"\d{1,3}|\w+|\s"), "greater-than", n=2)


def test_names_and_plurals_that_differ_in_length(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("twotower.prompts.classics.NAMES", ["Al", "Bob", "Carl", "Diana", "Esther"])
    with pytest.raises(
        tt.errors.InputError, match="needs 5 names with as many tokens; .* leaves 2"
    ):
        classic_prompts(MODEL, "indirect-object", n=2)
    monkeypatch.setattr("twotower.prompts.classics.PEOPLE", "boy boys|man men")
    monkeypatch.setattr("twotower.prompts.classics.THINGS", "box boxes")
    with pytest.raises(tt.errors.InputError, match="agreement needs 5 nouns"):
        classic_prompts(MODEL, "agreement", n=2)
