"""Prompts with right and wrong answers of their own, and spans named by the user."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
from tiny import byte_level, tiny

import twotower as tt
from twotower.prompts.sequences import with_answers

TEXTS = ["When Mary and John left, John thanked", "Then Bob saw Al and Al greeted"]
GIVEN: dict[str, Any] = {"right": [" Mary", " Bob"], "wrong": [" John", " Al"]}


def make(texts: list[str] = TEXTS, **options: Any) -> tt.Prompts:
    return tt.contrast(tiny("llama-grouped"), texts, **{**GIVEN, **options})


def test_answers_are_the_tokens_after_each_prompt() -> None:
    prompts = make(wrong=[[" John", " Al"], [" Al", " John"]])
    assert prompts.labels == ("right", "wrong", "wrong 2")
    assert prompts.gold.tolist() == ["right", "right"]
    for row, text in enumerate(TEXTS):
        before = prompts.token_id[row][prompts.token_id[row] >= 0].tolist()
        for column, answer in enumerate(prompts.answers.text[row]):
            ids = prompts.answers.token_id[row, column]
            assert byte_level()(text + answer)["input_ids"] == [*before, *ids[ids >= 0]]


def test_spans_are_roles() -> None:
    prompts = make(spans=[{"IO": "Mary", "S2": (25, 29)}, {"IO": "Bob", "S2": (20, 22)}])
    for row, words in enumerate([("Mary", "John"), ("Bob", "Al")]):
        for role, word in zip(("IO", "S2"), words, strict=True):
            found = "".join(prompts.token[row][prompts.role[row] == role])
            assert found.strip() == word
    assert (prompts.role[:, -1] == "last").all()
    mask = tt.at(role=["S2", "last"]).mask(prompts)
    np.testing.assert_array_equal(mask, np.isin(prompts.role, ["S2", "last"]))
    with pytest.raises(tt.errors.InputError, match="no position of the prompts has the role 'S1'"):
        tt.at(role="S1").mask(prompts)


def test_sequences_share_beginnings_and_serve_every_answer_once() -> None:
    """Two answers that differ only in their last token need one sequence."""
    prompts = make(right=[" xa", " Bob"], wrong=[" xb", " Al"])
    sequences = with_answers(prompts)
    assert sequences.owner.tolist() == [0, 1, 1]
    for row in range(2):
        for label in range(2):
            number = sequences.source[row, label]
            assert sequences.owner[number] == row
            ids = sequences.target[number, :, label]
            known = prompts.answers.token_id[row, label]
            assert ids[ids >= 0].tolist() == known[known >= 0].tolist()
            added = sequences.token_id[number][sequences.role[number] == "answer"]
            assert added.tolist() == ids[ids >= 0][:-1].tolist() or len(added) >= (ids >= 0).sum()
    wide = sequences.role == "answer"
    assert (sequences.where("last") == (wide | (sequences.role == "last"))).all()


def test_a_split_keeps_prompts_whole() -> None:
    texts = [f"word {c} is" for c in "abcdef"]
    prompts = make(texts, right=[" x"] * 6, wrong=[" y"] * 6)
    first, second = prompts.split(0.5)
    assert sorted(first.strings + second.strings) == sorted(texts)


def test_chat_is_the_tokenizers_own_template() -> None:
    tokenizer = copy.deepcopy(byte_level())
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    model = tt.load(tiny("llama-grouped").module, tokenizer=tokenizer, check=False)
    task = tt.Task("t", {"x": ["cat", "dog", "cow"], "y": ["Rome", "Oslo", "Bern"]})
    prompts = tt.build_prompts(
        model, task, ("foo", "bar"), 1, 2, template="chat", instruction="One word."
    )
    for row, prompt in enumerate(prompts):
        said = [s.text for s in prompt.segments if s.role in ("text", "label", "query")]
        messages = [{"role": "system", "content": "One word."}] + [
            {"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(said)
        ]
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert prompts.token_id[row][prompts.token_id[row] >= 0].tolist() == ids
        labels = prompts.token[row][prompts.role[row] == "label"].tolist()
        assert sorted(labels) == ["bar", "foo"]
        for number in (0, 1):
            own = "".join(prompts.token[row][prompts.demonstration[row] == number])
            text, label = said[2 * number : 2 * number + 2]
            assert own == f"{text}\n[assistant]{label}\n[user]"
    asked = tt.contrast(model, ["Who?"], ["Ann"], ["Bob"], template="chat")
    assert asked.strings == ["[user]Who?\n[assistant]"]
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}>"
    short = tt.contrast(model, ["Who?"], ["Ann"], ["Bob"], template="chat")
    assert short.token[0][-1] == ">"  # the template's only token is the last one
    with pytest.raises(tt.errors.InputError, match="needs a tokenizer with a chat template"):
        tt.contrast(tiny("gpt2"), ["Who?"], ["Ann"], template="chat")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"right": [" Mary"]}, "2 texts and 1 entries of right="),
        ({"right": [" Mary", ""]}, "prompt 1: right= holds an empty text"),
        ({"right": ["Mary", "Bob"]}, "would follow 'hn thanked' without a space; write ' Mary'"),
        ({"right": [" John", " Bob"]}, "prompt 0: ' John' and ' John' are the same tokens"),
        ({"wrong": [[" John"], []]}, "prompt 1 has no wrong answer; give each prompt as many"),
        ({"wrong": [[" J"], [" A", " B"]]}, "prompt 1 has 2 wrong answers and prompt 0 has 1"),
        ({"wrong": [[" John"], None]}, "entry 1 is None"),
        ({"wrong": [[], []]}, "prompt 0 has no wrong answer"),
        ({"texts": [], "right": [], "wrong": []}, "texts= is empty"),
        (
            {"scoring": "first", "join": "", "right": ["Mary"] * 2, "wrong": ["Johnny", "Al"]},
            "'Mary' has 3 tokens and 'Johnny' 6, so their first tokens cannot be compared",
        ),
        ({"name": 3}, "name=3 must be a text"),
        ({"wrong": " John"}, "wrong= must be a list"),
        ({"scoring": "first"}, "begin with the same token, so scoring='first' cannot tell"),
        ({"scoring": "product"}, "scoring='product' is not known"),
        ({"spans": [{"a": "John"}, {}]}, "'John' occurs 2 times"),
        ({"spans": [{"a": (30, 99)}, {}]}, "leaves the text of 37 characters"),
        ({"spans": [{"a": (5, 9), "b": (7, 12)}, {}]}, "the span 'b' overlaps another"),
        ({"spans": [{"last": (5, 9)}, {}]}, "'last' cannot name a span"),
        ({"spans": [{"end": (36, 37)}, {}]}, "has no token of its own"),
        ({"spans": {"a": "Mary"}}, "spans= must be a list with a dict for each"),
        ({"template": "{text}"}, "whole texts take no template but 'chat'"),
        ({"instruction": "Be brief."}, "pass template='chat'"),
        ({"right": [" Mary" * 80, " Bob"]}, "tokens with its answer and the model takes 256"),
    ],
)
def test_refusals(options: dict[str, Any], message: str) -> None:
    with pytest.raises(tt.errors.InputError, match=message):
        make(**{"texts": TEXTS, **options})


def test_what_needs_labels_says_so() -> None:
    prompts = make()
    for method in (prompts.reversed_labels, prompts.other_queries):
        with pytest.raises(tt.errors.InputError, match="answers of their own"):
            method()
    with pytest.raises(tt.errors.InputError, match="answers differ by prompt"):
        _ = prompts.label_ids
