"""Slices, halves, reversed labels and hashes of prompts, and prompts from strings."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import numpy as np
import pytest
from tiny import ANIMALS, CITIES, THREE, TWO, byte_level

import twotower as tt
from twotower.prompts.prompts import BY_POSITION


@pytest.fixture(scope="module")
def six(llama: tt.Model) -> tt.Prompts:
    return tt.build_prompts(llama, TWO, shots=2, n=6, seed=2)


def write(*pairs: tuple[str, str], query: str) -> tuple[str, list[tuple[int, int]]]:
    """A string of demonstrations and a query, and the spans of its labels."""
    string, spans = "", []
    for text, label in pairs:
        string += f"{text}: "
        spans.append((len(string), len(string) + len(label)))
        string += f"{label}\n"
    return f"{string}{query}:", spans


def own(model: tt.Model, *written: tuple[str, list[tuple[int, int]]], **options: Any) -> tt.Prompts:
    strings, spans = zip(*written, strict=True)
    gold = options.pop("gold", ["foo"] * len(strings))
    return tt.prompts_from_strings(model, strings, spans, gold, **options)


# ---- some of the prompts -----------------------------------------------------------


@pytest.mark.parametrize(
    ("index", "rows"),
    [
        (slice(1, 4), [1, 2, 3]),
        (slice(None, None, -2), [5, 3, 1]),
        (-1, [5]),
        (np.int64(2), [2]),
        ([5, 0, 0], [5, 0, 0]),
        (np.array([True, False, False, True, False, False]), [0, 3]),
    ],
)
def test_any_index_keeps_every_array_in_line(six: tt.Prompts, index: Any, rows: list[int]) -> None:
    some = six[index]
    assert some.strings == [six.strings[i] for i in rows]
    assert some.n_positions == max(six.lengths[i] for i in rows)
    assert some.gold.tolist() == six.gold[rows].tolist()
    assert [some.labels[k] for k in some.gold_index] == some.gold.tolist()
    assert (some.labels, some.label_ids) == (six.labels, six.label_ids)
    for name in BY_POSITION:
        # Counted from the end nothing moves.
        np.testing.assert_array_equal(
            getattr(some, name), getattr(six, name)[rows][:, six.n_positions - some.n_positions :]
        )


def test_padding_that_one_prompt_needs_stays(six: tt.Prompts) -> None:
    order = np.argsort(six.lengths)
    both = six[[int(order[0]), int(order[-1])]]
    gap = six.lengths[order[-1]] - six.lengths[order[0]]
    assert gap > 0
    assert both.n_positions == six.lengths[order[-1]]
    assert both.role[0].tolist().count("pad") == gap
    assert "pad" not in both.role[1]


@pytest.mark.parametrize("index", [6, -7, [0, 6]])
def test_an_index_beyond_the_end(six: tt.Prompts, index: Any) -> None:
    with pytest.raises(IndexError, match="6"):
        six[index]


def test_none_of_the_prompts(six: tt.Prompts) -> None:
    assert len(six[:0]) == 0
    assert six[:0].n_positions == 0
    assert six[:0].texts == set()


def test_a_slice_of_prompts_equals_prompts_built_alone(llama: tt.Model, six: tt.Prompts) -> None:
    few = tt.build_prompts(llama, TWO, shots=2, n=3, seed=2)
    assert six[:3].hash == few.hash
    for name in BY_POSITION:
        np.testing.assert_array_equal(getattr(six[:3], name), getattr(few, name))


def test_iteration_and_texts(six: tt.Prompts) -> None:
    assert [p.string for p in six] == six.strings
    shown = {s.text for p in six for s in p.segments if s.role in ("text", "query")}
    assert six.texts == shown
    assert shown <= {*ANIMALS, *CITIES}


@pytest.mark.parametrize("name", ["label", "first", "", None])
def test_positions_nobody_knows(six: tt.Prompts, name: Any) -> None:
    with pytest.raises(tt.errors.InputError, match="is not known; use one of last, labels, all"):
        six.where(name)


def test_where_names_real_tokens(six: tt.Prompts) -> None:
    assert set(six.token[six.where("labels")].tolist()) == {" foo", " bar"}
    assert set(six.token[six.where("last")].tolist()) == {":"}
    assert (six.where("all") == (six.role != "pad")).all()


# ---- halves ------------------------------------------------------------------------


@pytest.mark.parametrize(("fraction", "sizes"), [(0.5, (9, 9)), (0.67, (12, 6)), (0.3, (5, 13))])
def test_halves_have_their_sizes_and_the_settings_of_the_whole(
    llama: tt.Model, fraction: float, sizes: tuple[int, int]
) -> None:
    shots = {"foo": 2, "bar": 1, "map": 1}
    prompts = tt.build_prompts(
        llama, THREE, shots=shots, n=18, order="blocked", template="{text} -> {label}\n"
    )
    halves = prompts.split(fraction, seed=3)
    assert tuple(map(len, halves)) == sizes
    assert not halves[0].texts & halves[1].texts
    for half in halves:
        assert half.labels == prompts.labels
        assert half.task_name == prompts.task_name
        for prompt in half:
            shown = [s for s in prompt.segments if s.role == "text"]
            assert Counter(s.label for s in shown) == shots
            classes = [s.demonstration_class for s in shown]
            assert classes == sorted(classes)  # blocked, class after class
            assert prompt.string.endswith(" ->")
            assert prompt.text not in {s.text for s in shown}
            for segment in shown:
                assert segment.text in THREE.texts[segment.demonstration_class]
    assert len({(p.query_class, p.gold) for p in halves[0][:9]}) == min(9, sizes[0])


def test_halves_of_shared_demonstrations_share_their_own(llama: tt.Model) -> None:
    prompts = tt.build_prompts(llama, TWO, shots=2, n=8, shared_demonstrations=True)
    shown = [
        {s.text for p in half for s in p.segments if s.role == "text"}
        for half in prompts.split(0.5)
    ]
    assert [len(texts) for texts in shown] == [4, 4]
    assert not shown[0] & shown[1]


def test_a_half_can_be_split_again(llama: tt.Model) -> None:
    task = tt.Task("numbers", {c: [f"{c} {i}" for i in range(40)] for c in ("owl", "cow")})
    first, _ = tt.build_prompts(llama, task, shots=2, n=16).split(0.5)
    parts = first.split(0.5)
    assert [len(part) for part in parts] == [4, 4]
    assert not parts[0].texts & parts[1].texts
    # Texts of the half alone, not of the whole task.
    allowed = {t for texts in first.recipe.task.texts.values() for t in texts}
    assert parts[0].texts | parts[1].texts <= allowed
    assert len(allowed) == 40


def test_the_same_seed_gives_the_same_halves(six: tt.Prompts) -> None:
    hashes = [tuple(h.hash for h in six.split(0.5, seed=seed)) for seed in (4, 4, 5)]
    assert hashes[0] == hashes[1] != hashes[2]


def test_slices_with_common_texts_cannot_be_split(six: tt.Prompts) -> None:
    with pytest.raises(tt.errors.InputError, match=r"linked by common texts.*task.split"):
        six[:].split(0.5)


def test_groups_of_strings_stay_whole(llama: tt.Model) -> None:
    """Three groups: a text links two prompts as a demonstration, or as one's query."""
    prompts = own(
        llama,
        write(("cat", "foo"), ("Rome", "bar"), query="dog"),
        write(("owl", "foo"), ("Lima", "bar"), query="cow"),
        write(("hen", "foo"), ("Rome", "bar"), query="ape"),
        write(("yak", "foo"), ("Oslo", "bar"), query="one"),
        write(("cow", "foo"), ("Ulm", "bar"), query="two"),
    )
    groups = [{0, 2}, {1, 4}, {3}]
    seen = set()
    for seed in range(12):
        halves = prompts.split(0.4, seed=seed)
        rows = [{prompts.strings.index(s) for s in half.strings} for half in halves]
        assert rows[0] | rows[1] == {0, 1, 2, 3, 4}
        assert all(group <= rows[0] or group <= rows[1] for group in groups)
        assert not halves[0].texts & halves[1].texts
        seen.add(frozenset(rows[0]))
        again = prompts.split(0.4, seed=seed)
        assert [h.hash for h in again] == [h.hash for h in halves]
    assert len(seen) > 1


def test_a_text_is_the_same_first_later_and_as_a_query(llama: tt.Model) -> None:
    """Blanks and line breaks around a text depend on its place, and link nothing less."""
    prompts = own(
        llama,
        write(("cat", "foo"), query="dog"),
        write(("owl", "foo"), ("cat", "foo"), query="hen"),
        write(("hen", "foo"), query="cow"),
    )
    with pytest.raises(tt.errors.InputError, match="linked by common texts"):
        prompts.split(0.5)


def test_one_large_group_and_one_small(llama: tt.Model) -> None:
    """The first part is asked for more than the smaller group and less than the whole."""
    linked = [write(("cat", "foo"), query=word) for word in ANIMALS[1:8]]
    prompts = own(llama, *linked, write(("Rome", "foo"), query="Oslo"))
    for seed in range(4):
        assert sorted(map(len, prompts.split(0.9, seed=seed))) == [1, 7]


@pytest.mark.parametrize("fraction", [0, 1, -0.5, 1.5, 0.05, 0.95, float("nan")])
def test_an_empty_part_is_refused(six: tt.Prompts, fraction: float) -> None:
    with pytest.raises(tt.errors.InputError, match="strictly between|a part is empty|finite"):
        six.split(fraction)


# ---- reversed labels ---------------------------------------------------------------


def test_reversed_labels_change_labels_alone(llama: tt.Model) -> None:
    prompts = tt.build_prompts(llama, THREE, shots=1, n=9)
    twin = prompts.reversed_labels()
    new = {"foo": "bar", "bar": "map", "map": "foo", "": ""}
    for name in ("role", "demonstration", "demonstration_class"):
        np.testing.assert_array_equal(getattr(twin, name), getattr(prompts, name))
    assert twin.label_text.tolist() == [[new[x] for x in row] for row in prompts.label_text]
    assert twin.gold.tolist() == [new[x] for x in prompts.gold]
    assert twin.query_class.tolist() == prompts.query_class.tolist()
    assert twin.labels == prompts.labels
    others = ~prompts.where("labels")
    np.testing.assert_array_equal(twin.token_id[others], prompts.token_id[others])
    assert (twin.token_id != prompts.token_id)[~others].all()


def test_reversed_labels_leave_texts_that_hold_label_words(llama: tt.Model) -> None:
    task = tt.Task("tricky", {"a": ["foo", "foo foo", "a foo: x"], "b": ["bar", "no bar", "b"]})
    prompts = tt.build_prompts(llama, task, shots=2, n=4, instruction="foo or bar\n")
    twin = prompts.reversed_labels()
    assert [p.text for p in twin] == [p.text for p in prompts]
    assert twin.texts == prompts.texts
    assert all(p.string.startswith("foo or bar\n") for p in twin)


def test_a_span_that_holds_the_labels_blank_keeps_it(llama: tt.Model) -> None:
    string, [(start, end)] = write(("cat", "foo"), query="dog")
    prompts = own(llama, (string, [(start - 1, end)]), labels=["foo", "bar"])
    assert prompts.token[prompts.where("labels")].tolist() == [" foo"]
    assert prompts.reversed_labels().strings == ["cat: bar\ndog:"]


# ---- hash --------------------------------------------------------------------------


def test_the_hash_changes_with_whatever_matters(llama: tt.Model, six: tt.Prompts) -> None:
    build = tt.build_prompts
    same = build(llama, TWO, shots=2, n=6, seed=2)
    assert same.hash == six.hash
    assert len(six.hash) == 64
    unlike = {
        "seed": build(llama, TWO, shots=2, n=6, seed=3),
        "n": build(llama, TWO, shots=2, n=5, seed=2),
        "labels": build(llama, TWO, ("foo", "map"), shots=2, n=6, seed=2),
        "label order": build(llama, TWO, ("bar", "foo"), shots=2, n=6, seed=2),
        "template": build(llama, TWO, shots=2, n=6, seed=2, template="{text}; {label}\n"),
        "order of prompts": six[::-1],
        "reversed": six.reversed_labels(),
    }
    hashes = {name: prompts.hash for name, prompts in unlike.items()}
    assert len({six.hash, *hashes.values()}) == len(unlike) + 1


def test_the_hash_tells_golds_and_classes_apart(llama: tt.Model) -> None:
    written = write(("cat", "foo"), ("Rome", "bar"), query="dog")
    hashes = {
        own(llama, written).hash,
        own(llama, written, gold=["bar"], query_class=["foo"]).hash,
        own(llama, written, classes=[["x", "y"]], query_class=["x"]).hash,
        own(llama, written, query_class=["x"]).hash,
    }
    assert len(hashes) == 4


def test_the_hash_knows_the_tokenizer(llama: tt.Model, six: tt.Prompts) -> None:
    other = type(llama)(llama.traced, byte_level(bos=True), llama.architecture, "with bos")
    assert tt.build_prompts(other, TWO, shots=2, n=6, seed=2).hash != six.hash


# ---- prompts from strings ----------------------------------------------------------


def test_strings_give_the_roles_their_spans_say(llama: tt.Model) -> None:
    prompts = own(llama, write(("cat", "foo"), ("foo", "bar"), query="bar foo"))
    found = list(zip(prompts.token[0].tolist(), prompts.role[0].tolist(), strict=True))
    assert found == [
        ("cat", "text"),
        (":", "text"),
        (" foo", "label"),
        ("\n", "text"),
        ("foo", "text"),
        (":", "text"),
        (" bar", "label"),
        ("\n", "query"),
        ("bar", "query"),
        (" foo", "query"),
        (":", "last"),
    ]
    assert prompts.demonstration[0].tolist() == [0, 0, 0, 1, 1, 1, 1, -1, -1, -1, -1]
    assert prompts.demonstration_class[0].tolist() == ["foo"] * 3 + ["bar"] * 4 + [""] * 4
    assert prompts.label_text[0].tolist() == ["foo"] * 3 + ["bar"] * 4 + [""] * 4


def test_strings_equal_prompts_that_were_built(llama: tt.Model, six: tt.Prompts) -> None:
    """The same strings by their spans: same tokens, labels and last positions."""
    spans = []
    for item in six:
        at, found = 0, []
        for segment in item.segments:
            if segment.role == "label":
                found.append((at, at + len(segment.text)))
            at += len(segment.text)
        spans.append(found)
    again = tt.prompts_from_strings(llama, six.strings, spans, list(six.gold), six.labels)
    np.testing.assert_array_equal(again.token_id, six.token_id)
    np.testing.assert_array_equal(again.where("labels"), six.where("labels"))
    assert again.label_ids == six.label_ids
    labels = six.where("labels")
    np.testing.assert_array_equal(again.demonstration[labels], six.demonstration[labels])
    np.testing.assert_array_equal(again.label_text[labels], six.label_text[labels])
    np.testing.assert_array_equal(again.gold, six.gold)


def test_defaults_of_strings(llama: tt.Model) -> None:
    written = write(("cat", "map"), ("Rome", "foo"), query="dog")
    prompts = own(llama, written)
    assert prompts.labels == ("map", "foo")  # as they appear
    assert prompts.query_class.tolist() == ["foo"]
    assert prompts.task_name == ""
    assert prompts.recipe is None
    assert [p.text for p in prompts] == ["dog:"]
    ordered = own(llama, written, labels=["foo", "bar", "map"])
    assert ordered.labels == ("foo", "bar", "map")
    assert ordered.gold_index.tolist() == [0]


def test_given_classes(llama: tt.Model) -> None:
    prompts = own(
        llama,
        write(("cat", "foo"), ("Rome", "bar"), query="dog"),
        write(("Oslo", "bar"), query="Lima"),
        gold=["foo", "bar"],
        classes=[["animal", "city"], ["city"]],
        query_class=["animal", "city"],
    )
    labels = prompts.where("labels")
    assert prompts.demonstration_class[labels].tolist() == ["animal", "city", "city"]
    assert prompts.query_class.tolist() == ["animal", "city"]


def test_prompts_without_demonstrations(llama: tt.Model) -> None:
    prompts = own(llama, ("dog:", []), labels=["foo", "bar"])
    assert not prompts.where("labels").any()
    assert [llama.tokenizer.decode([i]) for i in prompts.label_ids] == [" foo", " bar"]


ONE = write(("cat", "foo"), query="dog")


@pytest.mark.parametrize(
    ("written", "options", "message"),
    [
        (("cat: foo\ndog:", [(5, 5)]), {}, r"span \(5, 5\) of label 0 is empty, overlaps"),
        (("cat: foo\ndog:", [(4, 5)]), {}, r"span \(4, 5\) of label 0 is empty"),  # a blank
        (("cat: foo\ndog:", [(-9, -6)]), {}, r"span \(-9, -6\) of label 0"),
        (("cat: foo bar:", [(5, 8), (7, 12)]), {}, r"\(7, 12\) of label 1 .*overlaps"),
        (("a: foo\nb: bar\nc:", [(10, 13), (3, 6)]), {}, r"\(3, 6\) of label 1 .*overlaps"),
        (("cat: foo\ndog:", [(5, 99)]), {}, "ends beyond the text's 13 characters"),
        (("cat: foo\n", [(5, 8)]), {}, "prompt 0 ends with a label; add a query"),
        (ONE, {"gold": ["bar"]}, "correct label 'bar' is not among the labels"),
        (ONE, {"gold": []}, "1 lists of spans and 0 correct labels"),
        (ONE, {"labels": ["bar"], "gold": ["bar"]}, "labels that are not in labels="),
        (ONE, {"classes": [["a", "b"]]}, "prompt 0 has 1 labels and 2 classes"),
        (ONE, {"classes": []}, "1 strings and 0 entries of classes="),
        (ONE, {"query_class": ["a", "b"]}, "1 strings and 2 entries of query_class="),
        (("x " * 200 + "cat: foo\ndog:", [(405, 408)]), {}, "tokens and the model takes 256"),
    ],
)
def test_strings_that_make_no_prompts(
    llama: tt.Model, written: Any, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(tt.errors.InputError, match=message):
        own(llama, written, **options)


def test_labels_of_a_demonstration_off_the_querys_form(llama: tt.Model) -> None:
    """One label stands without the blank that the query expects before it."""
    string = "cat: foo\nRome:foo\ndog:"
    with pytest.raises(tt.errors.InputError, match="prompt 0, demonstration 1: the label 'foo'"):
        own(llama, (string, [(5, 8), (14, 17)]))


# ---- the record ---------------------------------------------------------------------


def test_results_say_how_their_prompts_were_built(llama: tt.Model, six: tt.Prompts) -> None:
    def record(prompts: tt.Prompts) -> dict:
        return json.loads(tt.predict(llama, prompts).attrs["prompts"])

    assert record(six)["shots"] == 2
    assert record(six)["template"] == "{text}: {label}\n"
    first, second = (record(part)["part"] for part in six.split(0.5, seed=4))
    assert (first, second) == ("split(0.5, 4)[0]", "split(0.5, 4)[1]")
    assert record(six[:2]) == {}


# ---- another order of demonstrations -----------------------------------------------


def test_reordered_demonstrations_keep_texts_labels_and_query(six: tt.Prompts) -> None:
    moved = six.reordered([[3, 1, 0, 2]] * len(six))
    for before, after in zip(six.strings, moved.strings, strict=True):
        lines = before.splitlines()
        assert after.splitlines() == [lines[3], lines[1], lines[0], lines[2], lines[4]]
    assert moved.gold.tolist() == six.gold.tolist()
    for row in range(len(six)):
        at = moved.role[row] == "label"
        assert moved.demonstration[row][at].tolist() == [0, 1, 2, 3]
        held = six.label_text[row][six.role[row] == "label"]
        assert moved.label_text[row][at].tolist() == held[[3, 1, 0, 2]].tolist()


def test_reordering_keeps_an_instruction_in_front(llama: tt.Model) -> None:
    one = tt.build_prompts(llama, TWO, shots=1, n=1, instruction="one two\n")
    lines = one.strings[0].splitlines()
    assert one.reordered([[1, 0]]).strings[0].splitlines() == [lines[i] for i in (0, 2, 1, 3)]


@pytest.mark.parametrize("order", [[0, 1, 2], [0, 1, 2, 2], [0, 1, 2, 4]])
def test_orders_that_lose_a_demonstration_are_refused(six: tt.Prompts, order: list[int]) -> None:
    with pytest.raises(tt.errors.InputError, match="does not name each demonstration once"):
        six.reordered([order] * len(six))


def test_prompts_from_strings_are_not_reordered(llama: tt.Model) -> None:
    strings = own(llama, write(("cat", "foo"), ("Rome", "bar"), query="dog"))
    with pytest.raises(tt.errors.InputError, match="from a string"):
        strings.reordered([[1, 0]])
