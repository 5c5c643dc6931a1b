"""Labels: which goes with which class, and whether each is one token in every prompt."""

from __future__ import annotations

from typing import Any

import pytest
from tiny import ANIMALS, CITIES, THREE, TWO, byte_level, tiny
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

import twotower as tt

# The labels that are one token of the tests' tokenizer, as classes.
NAMED = tt.Task("named", {"bar": CITIES, "foo": ANIMALS})


def pairs(prompts: tt.Prompts) -> set[tuple[str, str]]:
    """(class, label) of every demonstration and query."""
    found = {(p.query_class, p.gold) for p in prompts}
    for prompt in prompts:
        found |= {(s.demonstration_class, s.label) for s in prompt.segments if s.label}
    return found


def build(task: tt.Task, labels: Any, **options: Any) -> tt.Prompts:
    return tt.build_prompts(tiny("llama-grouped"), task, labels, 2, 8, **options)


# ---- with meaning ------------------------------------------------------------------


@pytest.mark.parametrize("labels", [("foo", "bar"), ("bar", "foo")])
@pytest.mark.parametrize("permute", [None, False])
def test_names_of_the_classes_go_with_their_classes(labels: Any, permute: bool | None) -> None:
    prompts = build(NAMED, labels, permute_labels=permute)
    assert pairs(prompts) == {("foo", "foo"), ("bar", "bar")}
    assert prompts.recipe.describe()["permute_labels"] is False
    for half in prompts.split(0.5):
        assert pairs(half) <= {("foo", "foo"), ("bar", "bar")}


def test_names_in_other_letters() -> None:
    task = tt.Task("named", {"FOO": ANIMALS, " Bar": CITIES})
    assert task.classes == ("FOO", "Bar")
    assert pairs(build(task, ("bar", "foo"))) == {("FOO", "foo"), ("Bar", "bar")}


def test_names_are_permuted_where_that_is_wanted() -> None:
    prompts = build(NAMED, ("foo", "bar"), permute_labels=True)
    assert len(pairs(prompts)) == 4
    assert prompts.recipe.describe()["permute_labels"] is True


def test_labels_by_class() -> None:
    labels = {"tool": "foo", "animal": "bar", "city": "map"}
    prompts = build(THREE, labels)
    assert pairs(prompts) == set(labels.items())
    assert prompts.labels == ("bar", "map", "foo")
    assert prompts.recipe.describe()["permute_labels"] is False
    assert len(pairs(build(THREE, labels, permute_labels=True))) == 9
    # A class's name may stand for another class where it is said so.
    assert pairs(build(NAMED, {"foo": "bar", "bar": "foo"})) == {("foo", "bar"), ("bar", "foo")}


def test_labels_by_class_where_classes_are_numbers() -> None:
    task = tt.Task("numbers", {0: ANIMALS, 1: CITIES})
    assert pairs(build(task, {1: "foo", 0.0: "bar"})) == {("1", "foo"), ("0", "bar")}


def test_other_labels_are_permuted() -> None:
    prompts = build(TWO, ("foo", "bar"))
    assert len(pairs(prompts)) == 4
    assert prompts.recipe.describe()["permute_labels"] is True


def test_default_labels_mean_nothing() -> None:
    prompts = build(NAMED, None)
    assert prompts.labels == ("map", "key")
    assert len(pairs(prompts)) == 4


@pytest.mark.parametrize(
    ("task", "labels", "message"),
    [
        (NAMED, ("foo", "map"), "label 'foo' is the name of a class of 'named' and other labels"),
        (NAMED, ("map", "BAR"), "pass permute_labels=True or False"),
        (TWO, {"animal": "foo"}, "names the classes animal; name each class of .* once: animal"),
        (TWO, {"animal": "foo", "town": "bar"}, "names the classes animal, town; name each"),
        (TWO, {"animal": "foo", "animal ": "bar", "city": "map"}, "name each class of .* once"),
        (TWO, {"animal": "foo", "city": "foo"}, "labels must differ"),
        (TWO, {"animal": "foo", "city": 3}, "label 3 must be a word"),
        (TWO, {"foo", "bar"}, "must be a list of words"),
    ],
)
def test_labels_that_are_refused(task: tt.Task, labels: Any, message: str) -> None:
    with pytest.raises(tt.errors.InputError, match=message):
        build(task, labels)


@pytest.mark.parametrize("permute", [True, False])
def test_some_names_are_allowed_where_permutation_is_decided(permute: bool) -> None:
    found = pairs(build(NAMED, ("map", "foo"), permute_labels=permute))
    assert len(found) == (4 if permute else 2)


# ---- the same token in every prompt ------------------------------------------------


def joining() -> PreTrainedTokenizerFast:
    """Letters, whole labels, and "z: foo" as one token."""
    letters = sorted(set("abcdefghijklmnopqrstuvwxyz: \n"))
    words = [*letters, "fo", "foo", "ba", "bar", " foo", " bar", "z:", "z: foo"]
    merges = [("f", "o"), ("fo", "o"), ("b", "a"), ("ba", "r"), (" ", "foo"), (" ", "bar")]
    merges += [("z", ":"), ("z:", " foo")]
    inner = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, merges))
    inner.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=inner)


def strings(texts: list[str], tokenizer: Any, **options: Any) -> tt.Prompts:
    model = tt.load(tiny("llama-grouped").module, tokenizer=tokenizer, check=False)
    spans = [
        [(s.index(label), s.index(label) + 3) for label in ("foo", "bar") if label in s]
        for s in texts
    ]
    return tt.prompts_from_strings(
        model, texts, spans, ["foo"] * len(texts), labels=("foo", "bar"), **options
    )


START = "a: foo\nb: bar\n"


def test_a_later_query_that_merges_with_its_label() -> None:
    assert len(strings([f"{START}c:", f"{START}d:"], joining())) == 2
    with pytest.raises(
        tt.errors.InputError,
        match=r"prompt 1: with the answer 'foo' after it the end of the prompt",
    ):
        strings([f"{START}c:", f"{START}z:"], joining())


def test_a_text_of_a_task_that_merges_with_its_label() -> None:
    task = tt.Task("t", {"x": ["a", "b", "quiz"], "y": ["d", "e", "f"]})
    model = tt.load(tiny("llama-grouped").module, tokenizer=joining(), check=False)
    with pytest.raises(
        tt.errors.InputError, match=r"prompt \d: with the label 'foo' behind it|is tokeni"
    ):
        tt.build_prompts(model, task, shots=2, n=12)


def test_blanks_before_a_label_that_differ_between_prompts() -> None:
    """With a blank before it the label is another token."""
    bare = START.replace(": ", ":")
    assert set(strings([f"{bare}c:"], joining()).token[0]) >= {"foo", "bar"}
    with pytest.raises(
        tt.errors.InputError,
        match=r"prompt 1: the label 'foo' would be 'foo' here and is ' foo' after prompt 0",
    ):
        strings([f"{START}c:", f"{bare}c:"], joining())


def test_a_label_of_other_tokens_in_a_later_prompt() -> None:
    """Two blanks before it are two tokens, also after the query."""
    with pytest.raises(
        tt.errors.InputError,
        match=r"prompt 1: the label 'foo' would be ' ' ' foo' here and is ' foo'",
    ):
        strings([f"{START}c:", f"{START}c:".replace(": ", ":  ")], joining())


def test_the_token_of_a_label_is_that_of_every_prompt() -> None:
    prompts = tt.build_prompts(tiny("llama-grouped"), TWO, shots=3, n=8)
    for text, ids in zip(prompts.strings, prompts.token_id, strict=True):
        for label, label_id in zip(prompts.labels, prompts.label_ids, strict=True):
            assert byte_level()(f"{text} {label}")["input_ids"] == [*ids[ids >= 0], label_id]
