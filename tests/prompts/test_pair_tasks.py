"""Tasks of pairs: from the package, from tables, and the prompts made of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from tiny import byte_level, sentencepiece, taking
from tokenizers import Tokenizer, normalizers
from transformers import PreTrainedTokenizerFast

import twotower as tt
from twotower.prompts.read_task import read_task

MODEL: Any = taking(byte_level())
PAIRS = [(f"word {k}", f"out{k}") for k in range(12)]
TASK = tt.PairTask("outs", PAIRS, "d", "s")
FRAME = pd.DataFrame(PAIRS, columns=["input", "output"])


def prepending_sentencepiece() -> PreTrainedTokenizerFast:
    """As Llama 2's: a mark is put before every text, so that no text begins without a blank."""
    inner = Tokenizer.from_str(sentencepiece().backend_tokenizer.to_str())
    inner.pre_tokenizer = None  # type: ignore[assignment]
    inner.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


# ---- from the package --------------------------------------------------------------


def test_there_are_many_bundled_tasks() -> None:
    assert len(tt.prompts.bundled_pairs()) >= 12
    assert {"capitals", "opposites", "past-tenses", "english-french"} <= set(
        tt.prompts.bundled_pairs()
    )


@pytest.mark.parametrize("name", tt.prompts.bundled_pairs())
def test_bundled_tasks_are_sound(name: str) -> None:
    task = tt.load_pairs(name)
    assert task.name == name
    assert task.description
    assert task.source
    assert len(task.pairs) >= 60
    folder = Path(tt.__file__).parent / "prompts" / "pairs"
    written = json.loads((folder / f"{name}.json").read_text("utf-8"))["pairs"]
    assert [list(pair) for pair in task.pairs] == written, "a pair is written twice, or in spaces"
    for given, output in task.pairs:
        assert given != output
        for text in (given, output):
            assert text == " ".join(text.split())
            assert ":" not in text
            assert len(text.split()) <= 2
    # Also where one only differs in case.
    folded = [given.casefold() for given, _ in task.pairs]
    assert len(set(folded)) == len(folded)
    assert tt.load_pairs(name, name="mine").name == "mine"


def test_the_readme_lists_every_bundled_task() -> None:
    page = (Path(tt.__file__).parent / "prompts" / "pairs" / "README.md").read_text("utf-8")
    listed = [line.split("|")[1:3] for line in page.splitlines() if line.startswith("| ")]
    found = {name.strip(): n.strip() for name, n in listed}
    for name in tt.prompts.bundled_pairs():
        assert found[name] == str(len(tt.load_pairs(name).pairs))


# ---- from tables -------------------------------------------------------------------

WRITE: dict[str, Callable[[Path], object]] = {
    "t.csv": lambda path: FRAME.to_csv(path, index=False),
    "t.tsv": lambda path: FRAME.to_csv(path, sep="\t", index=False),
    "t.json": lambda path: path.write_text(json.dumps(FRAME.to_dict("records"))),
}


@pytest.mark.parametrize("name", WRITE)
def test_a_file_of_every_form(name: str, tmp_path: Path) -> None:
    WRITE[name](tmp_path / name)
    task = tt.load_pairs(str(tmp_path / name))
    assert task.pairs == tuple(PAIRS)
    assert (task.name, task.source) == ("t", f"file {name}")


def test_first_tokens_of_answers_of_as_many_tokens_are_compared() -> None:
    outputs = ["foo", "bar", "map key", "key map", "cup foo bar"]
    pairs = list(zip("abcde", outputs, strict=True))
    prompts = tt.build_prompts(MODEL, tt.PairTask("p", pairs[:4]), shots=1, n=4, scoring="first")
    assert sorted(prompts.answers.n_tokens.tolist()) == [[1, 1], [1, 1], [2, 2], [2, 2]]
    fewer = tt.build_prompts(MODEL, tt.PairTask("p", pairs), shots=1, n=5, scoring="first")
    assert " cup foo bar" not in set(fewer.answers.text.ravel())
    odd = tt.PairTask("p", [("a", "foo"), ("b", "map key")])
    with pytest.raises(tt.errors.InputError, match="no output of 'p' has 1 others of as many"):
        tt.build_prompts(MODEL, odd, shots=1, n=1, scoring="first")
    single = tt.PairTask("p", list(zip("abcd", ["foo", "bar", "map", "key"], strict=True)))
    own = taking(prepending_sentencepiece())
    found = tt.build_prompts(own, single, shots=1, n=4, scoring="first")
    assert (found.answers.n_tokens == 1).all()


@pytest.mark.parametrize("name", WRITE)
def test_a_task_is_of_pairs_if_its_columns_say_so(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    WRITE[name](path)
    assert read_task(str(path)) == tt.load_pairs(path)
    assert read_task("capitals") == tt.load_pairs("capitals")
    assert read_task("animals-cities") == tt.load_task("animals-cities")
    with pytest.raises(tt.errors.InputError, match="there is no task 'nope'"):
        read_task("nope")
    with pytest.raises(tt.errors.InputError, match=r"has no column 'q'.* input= and output="):
        tt.load_pairs(FRAME, input="q")
    with pytest.raises(tt.errors.InputError, match=r"use load_pairs\('capitals'\)"):
        tt.load_task("capitals")
    with pytest.raises(tt.errors.InputError, match=r"use load_task\('animals-cities'\)"):
        tt.load_pairs("animals-cities")
    both = FRAME.assign(text=FRAME["input"], label=["a", "b"] * 6)
    both.to_csv(tmp_path / "both.csv", index=False)
    assert isinstance(read_task(str(tmp_path / "both.csv")), tt.Task)
    both.rename(columns={"input": "given"}).to_csv(tmp_path / "own.csv", index=False)
    task = read_task(str(tmp_path / "own.csv"), text="words", input="given")
    assert isinstance(task, tt.PairTask)
    (tmp_path / "ragged.csv").write_text("input,output\na,b\nc\n")
    with pytest.raises(tt.errors.InputError, match="line 3: the header names 2 columns"):
        read_task(str(tmp_path / "ragged.csv"))
    (tmp_path / "neither.csv").write_text("x,y\na,b\n")
    with pytest.raises(tt.errors.InputError, match="no column 'text'; it has x, y"):
        read_task(str(tmp_path / "neither.csv"))


def test_a_data_frame_with_other_columns() -> None:
    renamed = FRAME.rename(columns={"input": "country", "output": "capital"})
    task = tt.load_pairs(renamed, input="country", output="capital", name="mine")
    assert task.pairs == tuple(PAIRS)
    assert task.name == "mine"


def test_pairs_of_other_forms() -> None:
    dicts = [{"input": given, "output": output} for given, output in PAIRS]
    for form in (dict(PAIRS), dicts, [list(pair) for pair in PAIRS], PAIRS + PAIRS[:3]):
        assert tt.PairTask("t", form).pairs == tuple(PAIRS)


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ([("a", "b"), ("c", "d"), ("a", "e")], "'a' has the outputs 'b' and 'e'; keep one"),
        ([("a", "b"), ("c", " ")], r"pair 1 is \('c', ' '\)"),
        ([("a", "b"), ("", "c")], r"pair 1 is \('', 'c'\)"),
        ([("a", "b"), ("c", None)], "pair 1 is"),
        ([("a", "b"), ("c", "d", "e")], "pair 1 is"),
        ([("a", "b"), ("a", "b")], "has 1 pair; it needs at least 2"),
        ("a: b", "needs a list of"),
        (FRAME, "read files and tables by load_pairs"),
    ],
)
def test_what_is_no_task(pairs: Any, message: str) -> None:
    with pytest.raises(tt.errors.InputError, match=f"task 't'.*{message}"):
        tt.PairTask("t", pairs)


def test_what_cannot_be_loaded(tmp_path: Path) -> None:
    with pytest.raises(tt.errors.InputError, match=r"no task of pairs 'nonsense'.*capitals"):
        tt.load_pairs("nonsense")
    with pytest.raises(tt.errors.InputError, match="there is no file"):
        tt.load_pairs(tmp_path / "none.csv")
    with pytest.raises(tt.errors.InputError, match="dict is not a table"):
        tt.load_pairs({"a": "b"})
    for missing, message in ((float("nan"), "row 12 of table holds nan in"), (" ", "pair 11 is")):
        frame = FRAME.assign(output=[*FRAME["output"][:-1], missing])
        with pytest.raises(tt.errors.InputError, match=message):
            tt.load_pairs(frame)


# ---- prompts -----------------------------------------------------------------------


def shown(prompt: Any) -> list[tuple[str, str]]:
    """(text, label) of each demonstration."""
    return [(s.text, s.label) for s in prompt.segments if s.role == "text"]


def test_prompts_of_pairs() -> None:
    prompts = tt.build_prompts(MODEL, TASK, shots=4, n=24, wrong=2)
    assert prompts.labels == ("right", "wrong", "wrong 2")
    assert sorted(prompt.text for prompt in prompts.items[:12]) == sorted(dict(PAIRS))
    for prompt, answers in zip(prompts, prompts.answers.text, strict=True):
        assert answers[0].strip() == dict(PAIRS)[prompt.text]
        assert len(set(answers)) == 3
        assert {answer.strip() for answer in answers} <= set(dict(PAIRS).values())
        assert len(set(shown(prompt))) == 4
        assert set(shown(prompt)) <= set(PAIRS)
        assert prompt.text not in dict(shown(prompt))


def test_a_prompt_depends_only_on_the_seed_and_its_number() -> None:
    many, few = (tt.build_prompts(MODEL, TASK, shots=3, n=n, seed=2) for n in (20, 5))
    assert many.strings[:5] == few.strings
    assert np.array_equal(many.answers.text[:5], few.answers.text)
    assert tt.build_prompts(MODEL, TASK, shots=3, n=5, seed=3).strings != few.strings


def test_without_demonstrations_only_the_query_remains() -> None:
    prompts = tt.build_prompts(MODEL, TASK, shots=0, n=3)
    assert prompts.strings == [f"{prompt.text}:" for prompt in prompts]


def test_parts_have_no_common_pairs() -> None:
    first, second = TASK.split(0.25, seed=1)
    assert (len(first.pairs), len(second.pairs)) == (3, 9)
    assert set(first.pairs) | set(second.pairs) == set(PAIRS)
    assert (first.name, first.description, first.source) == ("outs", "d", "s")
    assert TASK.split(0.25, seed=1)[0] == first
    assert any(TASK.split(0.25, seed=seed)[0] != first for seed in (2, 3))
    one, two = tt.build_prompts(MODEL, TASK, shots=2, n=10).split(0.5, seed=1)
    assert (len(one), len(two)) == (5, 5)
    assert not one.texts & two.texts


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shots": 12}, "12 shots and a query need 13; give more pairs or fewer shots"),
        ({"wrong": 12}, "with wrong=12 needs 13"),
        ({"labels": ["foo", "bar"]}, "labels= needs a task of classes; 'outs' is one of pairs"),
        ({"order": "blocked"}, "order= needs a task of classes"),
        ({"permute_labels": True}, "permute_labels= needs a task of classes"),
        ({"shared_demonstrations": True}, "shared_demonstrations= needs a task of classes"),
    ],
)
def test_arguments_that_do_not_fit(options: dict[str, Any], message: str) -> None:
    with pytest.raises(tt.errors.InputError, match=message):
        tt.build_prompts(MODEL, TASK, n=2, **options)


@pytest.mark.parametrize("fraction", [0.05, 0.99])
def test_parts_that_would_be_too_small(fraction: float) -> None:
    with pytest.raises(tt.errors.InputError, match="12 pairs of 'outs' cannot be split"):
        TASK.split(fraction, seed=0)
    with pytest.raises(tt.errors.InputError, match="must be strictly between 0 and 1"):
        TASK.split(1.0, seed=0)


def test_outputs_that_are_decimals_stay_as_they_are(tmp_path: Path) -> None:
    rows = [("half", "0.5"), ("one", "1.0"), ("two", "2.00")]
    path = tmp_path / "numbers.csv"
    path.write_text("input,output\n" + "".join(f"{a},{b}\n" for a, b in rows))
    assert tt.load_pairs(path).pairs == tuple(rows)
    path.write_text("input,output\n" + "".join(f"{a},{b}\n" for a, b in [*rows[1:2], ("x", "3.0")]))
    assert tt.load_pairs(path).pairs == (("one", "1.0"), ("x", "3.0"))
