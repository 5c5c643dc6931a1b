"""Which texts demonstrate, in which order, under which labels."""

from __future__ import annotations

from collections import Counter
from functools import partial

import numpy as np
import pandas as pd
import pytest
from tiny import ANIMALS, CITIES, THREE, TWO, byte_level, hf_model

import twotower as tt


def demonstrations(prompt) -> list[tuple[str, str, str]]:
    """(text, class, label) of each demonstration."""
    return [(s.text, s.demonstration_class, s.label) for s in prompt.segments if s.role == "text"]


@pytest.mark.parametrize("task", [TWO, THREE])
def test_right_answers_are_balanced(llama: tt.Model, task: tt.Task) -> None:
    n = len(task.classes)
    prompts = tt.build_prompts(llama, task, shots=2, n=2 * n * n, seed=5)
    for block in (prompts[: n * n], prompts[n * n :]):
        pairs = Counter(zip(block.query_class, block.gold, strict=True))
        assert len(pairs) == n * n
        assert set(pairs.values()) == {1}


def test_queries_never_stand_among_their_demonstrations(llama: tt.Model) -> None:
    for prompt in tt.build_prompts(llama, TWO, shots=9, n=20):
        shown = demonstrations(prompt)
        assert prompt.text not in [text for text, _, _ in shown]
        assert len({text for text, _, _ in shown}) == 18


def test_labels_follow_classes(llama: tt.Model) -> None:
    prompts = tt.build_prompts(llama, THREE, shots=2, n=9)
    for prompt in prompts:
        label_of = {}
        for text, cls, label in demonstrations(prompt):
            assert text in THREE.texts[cls]
            assert label_of.setdefault(cls, label) == label
        assert label_of[prompt.query_class] == prompt.gold
        assert len(set(label_of.values())) == 3
    fixed = tt.build_prompts(llama, THREE, shots=2, n=9, permute_labels=False)
    assert {(p.query_class, p.gold) for p in fixed} == {
        ("animal", "foo"), ("city", "bar"), ("tool", "map")
    }  # fmt: skip


def test_a_prompt_depends_on_the_seed_and_its_number_alone(llama: tt.Model) -> None:
    few = tt.build_prompts(llama, TWO, shots=3, n=4, seed=7)
    many = tt.build_prompts(llama, TWO, shots=3, n=12, seed=7)
    assert many.strings[:4] == few.strings
    assert tt.build_prompts(llama, TWO, shots=3, n=4, seed=8).strings != few.strings


@pytest.mark.parametrize("task", [TWO, THREE])
@pytest.mark.parametrize(
    "options",
    [
        {"order": "alternating"},
        {"permute_labels": False},
        {"shared_demonstrations": True},
        {"shots": {"foo": 1, "bar": 3, "map": 2}},
    ],
    ids=lambda options: next(iter(options)),
)
def test_more_prompts_leave_the_first_as_they_are(
    llama: tt.Model, task: tt.Task, options: dict
) -> None:
    if "shots" in options:
        labels = ("foo", "bar", "map")[: len(task.classes)]
        options = {"shots": {label: options["shots"][label] for label in labels}}
    build = partial(tt.build_prompts, llama, task, seed=3, **{"shots": 3, **options})
    many, few = build(n=25), build(n=7)
    assert many[:7].hash == few.hash == build(n=7).hash
    # Unlike prompts: other queries, other demonstrations.
    assert len(set(many.strings)) > 20


@pytest.mark.parametrize("task", [TWO, THREE])
def test_classes_are_balanced_where_labels_stay(llama: tt.Model, task: tt.Task) -> None:
    n = len(task.classes)
    prompts = tt.build_prompts(llama, task, shots=2, n=2 * n * n, permute_labels=False)
    for block in (prompts[: n * n], prompts[n * n :]):
        assert Counter(block.query_class) == dict.fromkeys(task.classes, n)
        assert Counter(block.gold) == dict.fromkeys(prompts.labels, n)


def test_every_text_is_asked_before_one_is_asked_again(llama: tt.Model) -> None:
    asked = [p.text for p in tt.build_prompts(llama, TWO, shots=2, n=24)]
    by_class = {c: [t for t in asked if t in texts] for c, texts in TWO.texts.items()}
    for texts in by_class.values():
        assert len(texts) == 12
        assert len(set(texts[:10])) == 10


def test_default_labels_and_shots(llama: tt.Model) -> None:
    task = tt.Task("many", {c: [f"{c} {i}" for i in range(9)] for c in ("one", "two", "dog")})
    prompts = tt.build_prompts(llama, task)
    assert len(prompts) == 40
    assert prompts.labels == ("foo", "bar", "map")
    assert (prompts.where("labels").sum(axis=1) == 3 * 8).all()
    assert prompts.seed == 0
    assert prompts.task_name == "many"


def test_unbalanced_shots_of_three_labels(llama: tt.Model) -> None:
    shots = {"foo": 0, "map": 4, "bar": 1}
    prompts = tt.build_prompts(llama, THREE, shots=shots, n=9, order="alternating")
    shown = [demonstrations(p) for p in prompts]
    assert all(Counter(label for *_, label in row) == {"map": 4, "bar": 1} for row in shown)
    assert {Counter(c for _, c, _ in row).most_common(1)[0][0] for row in shown} == {*THREE.classes}
    for row in shown:  # in turn as long as there are two, then the rest
        assert sorted(label for *_, label in row[:2]) == ["bar", "map"]


def test_shared_demonstrations_of_unbalanced_shots(llama: tt.Model) -> None:
    """Where labels stay there is one set; where they change, the shorter is its start."""
    build = partial(
        tt.build_prompts, llama, TWO, shots={"foo": 4, "bar": 2}, n=8, shared_demonstrations=True
    )
    fixed = build(permute_labels=False)
    assert len({tuple(demonstrations(p)) for p in fixed}) == 1
    moving = build()
    for cls in TWO.classes:
        by_size = {
            len(texts): texts
            for texts in ([t for t, c, _ in demonstrations(p) if c == cls] for p in moving)
        }
        assert set(by_size) == {2, 4}
        assert set(by_size[2]) < set(by_size[4])
    shown = {t for p in moving for t, _, _ in demonstrations(p)}
    assert not shown & {p.text for p in moving}


def test_shared_demonstrations_differ_in_labels_alone(llama: tt.Model) -> None:
    prompts = tt.build_prompts(llama, THREE, shots=2, n=9, shared_demonstrations=True)
    assert len({tuple(t for t, _, _ in demonstrations(p)) for p in prompts}) == 1
    assert len({tuple(x for *_, x in demonstrations(p)) for p in prompts}) == 3
    assert len({p.text for p in prompts}) == 9


def test_unbalanced_shots_go_with_labels(llama: tt.Model) -> None:
    prompts = tt.build_prompts(llama, TWO, shots={"foo": 4, "bar": 1}, n=8)
    for prompt in prompts:
        assert Counter(label for _, _, label in demonstrations(prompt)) == {"foo": 4, "bar": 1}
    majorities = {Counter(c for _, c, _ in demonstrations(p)).most_common(1)[0][0] for p in prompts}
    assert majorities == {"animal", "city"}


def test_orders(llama: tt.Model) -> None:
    def classes(order: str) -> list[list[str]]:
        prompts = tt.build_prompts(llama, TWO, shots=3, n=4, order=order)
        return [[cls for _, cls, _ in demonstrations(p)] for p in prompts]

    assert all(row == ["animal"] * 3 + ["city"] * 3 for row in classes("blocked"))
    assert all(row == ["animal", "city"] * 3 for row in classes("alternating"))
    shuffled = classes("shuffled")
    assert len({tuple(row) for row in shuffled}) > 1
    assert all(sorted(row) == ["animal"] * 3 + ["city"] * 3 for row in shuffled)


def test_shared_demonstrations(llama: tt.Model) -> None:
    prompts = tt.build_prompts(llama, TWO, shots=3, n=8, shared_demonstrations=True)
    shown = [[text for text, _, _ in demonstrations(p)] for p in prompts]
    assert all(row == shown[0] for row in shown)
    assert not {p.text for p in prompts} & set(shown[0])


def test_templates(llama: tt.Model) -> None:
    prompts = tt.build_prompts(
        llama,
        TWO,
        shots=1,
        n=1,
        template="Input: {text}\nLabel: {label}\n\n",
        instruction="Sort.\n",
    )
    string = prompts.strings[0]
    assert string.startswith("Sort.\nInput: ")
    assert string.endswith("\nLabel:")
    assert string.count("Label: ") == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"labels": ("foo", "foo")}, "labels must differ"),
        ({"labels": ("foo",)}, "2 classes .* there are 1 labels"),
        ({"labels": "foo"}, "must be a list of words"),
        ({"labels": ("foo", " bar")}, "without spaces"),
        ({"shots": 10}, "has 10 texts here, and 10 shots and a query need 11"),
        ({"shots": {"foo": 1}}, "shots names the labels foo, not foo, bar"),
        ({"shots": -1}, "whole number"),
        ({"shots": 0}, "at least one demonstration"),
        ({"shots": True}, "whole number"),
        ({"shots": {"foo": 0, "bar": 0}}, "at least one demonstration"),
        ({"shots": {"foo": 2, "bar": 0.5}}, "whole number"),
        ({"shots": {"foo": 2, "bar": 10}}, "10 shots and a query need 11"),
        ({"scoring": "longest"}, "scoring='longest' is not known"),
        ({"seed": -1}, "seed=-1"),
        ({"seed": 0.5}, "seed=0.5"),
        ({"labels": ("foo", "")}, "label '' must be a word"),
        ({"labels": ("foo", 5)}, "label 5 must be a word"),
        ({"labels": ("foo", "bar", "map")}, "2 classes .* there are 3 labels"),
        ({"n": 2.0}, "n=2.0"),
        ({"template": "{text}{text}: {label}"}, "must hold {text} and then {label}"),
        ({"shots": 2.5}, "whole number"),
        ({"n": 0}, "n=0"),
        ({"n": True}, "n=True"),
        ({"order": "random"}, "order='random'"),
        ({"template": "{text} {label}"}, "a visible character between"),
        ({"template": "{label}: {text}"}, "must hold {text} and then {label}"),
        ({"template": "{text}"}, "must hold {text} and then {label}"),
    ],
)
def test_refusals(llama: tt.Model, arguments: dict, message: str) -> None:
    with pytest.raises(tt.errors.InputError, match=message):
        tt.build_prompts(llama, TWO, **{"shots": 2, "n": 2, **arguments})


def test_a_prompt_longer_than_the_context_is_refused() -> None:
    module = hf_model("gpt2")
    model = tt.load(module, tokenizer=byte_level())
    module.config.n_positions = 30
    with pytest.raises(tt.errors.InputError, match="tokens and the model takes 30"):
        tt.build_prompts(model, TWO, shots=8, n=2)


def test_splitting_parts_the_texts(llama: tt.Model) -> None:
    prompts = tt.build_prompts(llama, TWO, shots=3, n=10)
    first, second = prompts.split(0.5, seed=0)
    assert (len(first), len(second)) == (5, 5)
    assert not first.texts & second.texts
    again, _ = prompts.split(0.5, seed=0)
    assert again.strings == first.strings
    other, _ = prompts.split(0.5, seed=1)
    assert other.strings != first.strings


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0.0,), "strictly between"),
        ((1.0,), "strictly between"),
        ((0.01,), "a part is empty"),
        ((0.2,), "has 2 texts here"),
    ],
)
def test_splits_that_cannot_be(llama: tt.Model, arguments: tuple, message: str) -> None:
    prompts = tt.build_prompts(llama, TWO, shots=3, n=10)
    with pytest.raises(tt.errors.InputError, match=message):
        prompts.split(*arguments)


def own(llama: tt.Model) -> tt.Prompts:
    texts = (("cat", "Rome", "dog"), ("dog", "Oslo", "hen"), ("owl", "Lima", "ape"))
    strings = [f"{a}: foo\n{b}: bar\n{c}:" for a, b, c in texts]
    spans = []
    for string in strings:
        first = string.index("foo")
        second = string.index("bar")
        spans.append([(first, first + 3), (second, second + 3)])
    return tt.prompts_from_strings(llama, strings, spans, ["foo"] * 3)


def test_prompts_from_strings(llama: tt.Model) -> None:
    prompts = own(llama)
    assert prompts.labels == ("foo", "bar")
    assert prompts.query_class.tolist() == ["foo"] * 3
    for i in range(3):
        at = prompts.role[i] == "label"
        assert prompts.label_text[i][at].tolist() == ["foo", "bar"]
        assert prompts.demonstration[i][at].tolist() == [0, 1]
    first, second = prompts.split(0.5, seed=0)
    assert len(first) + len(second) == 3
    assert not first.texts & second.texts


def test_strings_in_columns_of_a_table_go_by_place(llama: tt.Model) -> None:
    """A table that was sorted or filtered has an index that is not 0, 1, ..."""
    frame = pd.DataFrame(
        {
            "string": ["cat: foo\nRome: bar\ndog:", "owl: foo\nOslo: bar\nLima:"],
            "spans": [[(5, 8), (15, 18)]] * 2,
            "gold": ["foo", "bar"],
            "classes": [["a", "c"]] * 2,
            "query": ["a", "c"],
        },
        index=[1, 0],
    )
    prompts = tt.prompts_from_strings(
        llama,
        frame["string"],
        frame["spans"],
        frame["gold"],
        classes=frame["classes"],
        query_class=frame["query"],
    )
    assert [(p.text, p.gold, p.query_class) for p in prompts] == [
        ("dog:", "foo", "a"),
        ("Lima:", "bar", "c"),
    ]


def test_strings_that_share_a_text_stay_together(llama: tt.Model) -> None:
    strings = ["cat: foo\ndog:", "cat: foo\nhen:"]
    prompts = tt.prompts_from_strings(llama, strings, [[(5, 8)]] * 2, ["foo"] * 2)
    with pytest.raises(tt.errors.InputError, match="linked by common texts"):
        prompts.split(0.5)


@pytest.mark.parametrize(
    ("strings", "spans", "gold", "message"),
    [
        (["a: foo\nb:"], [[(3, 6)], []], ["foo"], "one of each per prompt"),
        (["a: foo\nb:"], [[(6, 3)]], ["foo"], "is empty, overlaps"),
        (["a: foo\nb:"], [[(3, 60)]], ["foo"], "ends beyond"),
        (["a: foo"], [[(3, 6)]], ["foo"], "add a query after it"),
        (["a: foo\nb:"], [[(3, 6)]], ["bar"], "'bar' is not among the labels"),
        ([], [], [], "there are no prompts"),
    ],
)
def test_bad_strings(llama: tt.Model, strings, spans, gold, message: str) -> None:
    with pytest.raises(tt.errors.InputError, match=message):
        tt.prompts_from_strings(llama, strings, spans, gold)


def test_reversed_labels(llama: tt.Model) -> None:
    prompts = tt.build_prompts(llama, TWO, shots=2, n=4)
    twin = prompts.reversed_labels()
    assert (twin.role == prompts.role).all()
    swap = {"foo": "bar", "bar": "foo", "": ""}
    assert twin.label_text.tolist() == [[swap[x] for x in row] for row in prompts.label_text]
    assert twin.gold.tolist() == [swap[x] for x in prompts.gold]
    assert (twin.query_class == prompts.query_class).all()
    changed = twin.token_id != prompts.token_id
    assert (changed == (prompts.role == "label")).all()
    back = twin.reversed_labels()
    assert back.strings == prompts.strings
    assert back.hash == prompts.hash != twin.hash


def test_reversing_three_labels_is_a_cycle(llama: tt.Model) -> None:
    prompts = tt.build_prompts(llama, THREE, shots=1, n=3)
    once = prompts.reversed_labels()
    assert once.gold.tolist() == [
        {"foo": "bar", "bar": "map", "map": "foo"}[x] for x in prompts.gold
    ]
    assert once.reversed_labels().reversed_labels().strings == prompts.strings


def test_slicing(llama: tt.Model) -> None:
    prompts = tt.build_prompts(llama, TWO, shots=2, n=6)
    shortest = int(np.argmin(prompts.lengths))
    alone = prompts[shortest]
    assert alone.n_positions == prompts.lengths[shortest] < prompts.n_positions
    assert (alone.token_id >= 0).all()
    assert prompts[[4, 1]].strings == [prompts.strings[4], prompts.strings[1]]
    assert len(prompts[:2]) == 2
    with pytest.raises(IndexError):
        prompts[6]


def test_positions_by_name(llama: tt.Model) -> None:
    prompts = tt.build_prompts(llama, TWO, shots=2, n=4)
    assert (prompts.where("last").sum(axis=1) == 1).all()
    assert prompts.where("last")[:, -1].all()
    assert (prompts.where("labels").sum(axis=1) == 4).all()
    assert (prompts.where("all").sum(axis=1) == prompts.lengths).all()


def test_a_class_without_texts() -> None:
    with pytest.raises(tt.errors.InputError, match="class 'city' has no texts"):
        tt.Task("t", {"animal": ANIMALS, "city": []})


def test_a_text_in_two_classes() -> None:
    with pytest.raises(tt.errors.InputError, match="'cat' is in the classes"):
        tt.Task("t", {"animal": ANIMALS, "city": [*CITIES, "cat"]})


def test_texts_that_differ_in_blanks_are_the_same() -> None:
    task = tt.Task("t", {"a": ["cat", "cat ", " dog", "dog", "sea  lion", "sea lion"], "b": ["x"]})
    assert task.texts["a"] == ("cat", " dog", "sea  lion")
