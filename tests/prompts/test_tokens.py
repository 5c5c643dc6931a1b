"""Roles of tokens, for tokenizers that cut text in different ways."""

from __future__ import annotations

import itertools
import json
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from tiny import byte_level, sentencepiece, sentencepiece_model
from tokenizers import Tokenizer, decoders, models, normalizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import twotower as tt
from twotower.errors import InputError
from twotower.prompts.prompts import assemble
from twotower.prompts.segments import ROLES, Template

LABELS = ("foo", "bar")

AWKWARD = {
    "one": [
        "foo",  # a text that is a label
        "a bar: foo",  # label words and a colon
        "foo: foo: bar",
        "cat cat cat",
        "naïve Ångström",
        "😀",
        "two 👩‍👩‍👧 of us",
        "elephant",
    ],
    "two": [
        "bar",
        "Paris: the city",
        "שלום עולם",
        "مرحبا",
        "日本語のテキスト",
        "New York, New York!?",
        "tabs\tand   blanks",
        "x",
    ],
}

TEMPLATES = {
    "plain": Template(),
    "two lines": Template("Input: {text}\nLabel: {label}\n\n"),
    "instruction": Template("{text} -> {label}\n", "Sort each text, foo or bar: mind the colon.\n"),
    "label on its own line": Template("Q: {text}\nA:\n{label}\n", "foo: bar\n"),
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A SentencePiece model trained here, loaded as the tokenizer of a Llama folder."""
    import sentencepiece as library

    proto = sentencepiece_model()
    folder = tmp_path_factory.mktemp("spm")
    (folder / "tokenizer.model").write_bytes(proto)
    settings = {"tokenizer_class": "LlamaTokenizer", "legacy": False, "add_bos_token": True}
    settings |= {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "config.json").write_text('{"model_type": "llama"}')
    tokenizer = AutoTokenizer.from_pretrained(folder)
    processor = library.SentencePieceProcessor(model_proto=proto)
    sample = "elephant 😀: foo\nשלום:"
    assert tokenizer(sample)["input_ids"] == [1, *processor.encode(sample)]
    return tokenizer


@pytest.fixture(scope="module")
def prepending(trained: Any) -> Any:
    """The same pieces as Llama 2 has them: a normalizer puts the mark before the text."""
    inner = Tokenizer.from_str(trained.backend_tokenizer.to_str())
    inner.pre_tokenizer = None  # type: ignore[assignment]
    inner.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>")


KINDS = {
    "byte-level": False,
    "byte-level with bos": True,
    "sentencepiece-like": True,
    "sentencepiece": True,
    "sentencepiece, prepending": True,
}


@pytest.fixture(params=KINDS)
def tokenizer(request: pytest.FixtureRequest) -> Any:
    match request.param:
        case "byte-level":
            found = byte_level()
        case "byte-level with bos":
            found = byte_level(bos=True)
        case "sentencepiece-like":
            found = sentencepiece()
        case "sentencepiece":
            found = request.getfixturevalue("trained")
        case _:
            found = request.getfixturevalue("prepending")
    found.expects_bos = KINDS[request.param]
    return found


def _prompts(tokenizer: Any, template: Template) -> tt.Prompts:
    """Prompts that hold every awkward text as a demonstration and as a query."""
    pairs = [(text, cls) for cls, texts in AWKWARD.items() for text in texts]
    to_label = dict(zip(AWKWARD, LABELS, strict=True))
    items = []
    for number, (query, cls) in enumerate(pairs):
        others = [pairs[(number + 1 + k) % len(pairs)] for k in range(number % 7 + 1)]
        shown = [(text, c, to_label[c]) for text, c in others]
        items.append(template.prompt(shown, query, cls, to_label[cls]))
    return assemble(items, LABELS, tokenizer)


def _pieces(prompts: tt.Prompts, row: int) -> list[tuple[tuple[str, int], str]]:
    """Decoded text of each run of positions with one role and demonstration.

    The last position is put to the separator or query that it ends.
    """
    columns = [c for c in range(prompts.n_positions) if prompts.role[row, c] not in ("pad", "bos")]

    def key(column: int) -> tuple[str, int]:
        role = prompts.role[row, column]
        if role == "last":
            role = "separator"
        return role, int(prompts.demonstration[row, column])

    return [
        (what, prompts.tokenizer.decode([int(prompts.token_id[row, c]) for c in run]))
        for what, run in itertools.groupby(columns, key)
    ]


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_decoding_by_role_gives_the_segments_back(tokenizer: Any, template: Template) -> None:
    prompts = _prompts(tokenizer, template)
    assert {t for texts in AWKWARD.values() for t in texts} == prompts.texts
    for row, item in enumerate(prompts.items):
        expected: list[tuple[tuple[str, int], str]] = []
        for segment in item.segments:
            what = (segment.role, segment.demonstration)
            if expected and expected[-1][0] == what:
                expected[-1] = (what, expected[-1][1] + segment.text)
            else:
                expected.append((what, segment.text))
        found = _pieces(prompts, row)
        assert [what for what, _ in found] == [what for what, _ in expected]
        # A blank goes with the word behind it, which may be in the next segment; nothing
        # else may.
        assert [text.strip(" ") for _, text in found] == [text.strip(" ") for _, text in expected]


def test_a_label_is_one_token_and_the_right_one(tokenizer: Any) -> None:
    prompts = _prompts(tokenizer, TEMPLATES["plain"])
    ids = dict(zip(prompts.labels, prompts.label_ids, strict=True))
    assert len(set(ids.values())) == 2
    for row, item in enumerate(prompts.items):
        shown = [s for s in item.segments if s.role == "label"]
        columns = [c for c in range(prompts.n_positions) if prompts.role[row, c] == "label"]
        assert [prompts.token_id[row, c] for c in columns] == [ids[s.label] for s in shown]
        assert [prompts.demonstration[row, c] for c in columns] == list(range(len(shown)))
        assert [prompts.label_text[row, c] for c in columns] == [s.label for s in shown]
        assert [prompts.demonstration_class[row, c] for c in columns] == [
            s.demonstration_class for s in shown
        ]


def test_label_ids_are_what_follows_the_query(tokenizer: Any) -> None:
    """The tokenizer continues the query by exactly the label's id."""
    prompts = _prompts(tokenizer, TEMPLATES["plain"])
    for row in range(len(prompts)):
        ids = [int(i) for i in prompts.token_id[row] if i >= 0]
        for label, token in zip(prompts.labels, prompts.label_ids, strict=True):
            assert tokenizer(f"{prompts.strings[row]} {label}")["input_ids"] == [*ids, token]


def test_ends_padding_and_bos(tokenizer: Any) -> None:
    prompts = _prompts(tokenizer, TEMPLATES["two lines"])
    assert set(prompts.role.ravel().tolist()) <= set(ROLES)
    assert len(set(prompts.lengths.tolist())) > 3
    assert prompts.lengths.max() == prompts.n_positions
    for row, string in enumerate(prompts.strings):
        ids = tokenizer(string)["input_ids"]
        start = prompts.n_positions - len(ids)
        assert prompts.token_id[row, start:].tolist() == ids
        assert (prompts.role[row] == "last").nonzero()[0].tolist() == [prompts.n_positions - 1]
        assert (prompts.role[row] == "pad").nonzero()[0].tolist() == list(range(start))
        for name, value in (
            ("token_id", -1),
            ("token", ""),
            ("demonstration", -1),
            ("demonstration_class", ""),
            ("label_text", ""),
        ):
            assert set(getattr(prompts, name)[row, :start].tolist()) <= {value}, name
        bos = (prompts.role[row] == "bos").nonzero()[0].tolist()
        assert bos == ([start] if tokenizer.expects_bos else [])
        asked = [c for c in range(start, prompts.n_positions) if prompts.role[row, c] == "query"]
        assert asked
        assert {int(prompts.demonstration[row, c]) for c in asked} == {-1}
        assert {prompts.label_text[row, c] for c in asked} == {""}


def test_a_label_on_a_line_of_its_own() -> None:
    """The line break is a token of its own and predicts the label."""
    prompts = _prompts(byte_level(), TEMPLATES["label on its own line"])
    assert set(prompts.token[prompts.where("labels")].tolist()) == {"foo", "bar"}
    assert set(prompts.token[:, -1].tolist()) == {"\n"}
    assert set(prompts.token[:, -2].tolist()) == {":"}


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_a_token_has_the_role_of_its_last_character(template: Template) -> None:
    """Decoded beginnings of a prompt say how far its tokens have come."""
    prompts = _prompts(byte_level(bos=True), template)
    for row, item in enumerate(prompts.items):
        owners = [(s.role, s.demonstration) for s in item.segments for _ in s.text]
        columns = np.flatnonzero(prompts.token_id[row] >= 0)
        ids = prompts.token_id[row, columns].tolist()
        for count, column in enumerate(columns[1:], start=2):
            before = prompts.tokenizer.decode(ids[1:count])
            if before.endswith("\N{REPLACEMENT CHARACTER}"):  # some bytes of a character
                before = before.rstrip("\N{REPLACEMENT CHARACTER}") + "?"
            role, demonstration = owners[len(before) - 1]
            assert prompts.role[row, column] == ("last" if count == len(ids) else role)
            assert prompts.demonstration[row, column] == demonstration


def test_token_strings_are_single_tokens_decoded() -> None:
    prompts = _prompts(byte_level(), TEMPLATES["plain"])
    labels = prompts.token[prompts.role == "label"]
    assert set(labels.tolist()) == {" foo", " bar"}
    assert set(prompts.token[:, -1].tolist()) == {":"}


def test_a_token_over_two_segments_belongs_to_its_last_character() -> None:
    """A tokenizer without word borders, which joins the text's last letter and the colon."""
    characters = ["t", "o", ":", " ", "f", "\n", "b"]
    merges = [("t", ":"), (" ", "f"), (" ", "b")]
    words = [*characters, *(a + b for a, b in merges)]
    inner = Tokenizer(models.BPE({w: i for i, w in enumerate(words)}, merges))
    inner.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner)
    items = [Template().prompt([("tot", "x", "f"), ("ot", "y", "b")], "to", "x", "f")]
    prompts = assemble(items, ("f", "b"), tokenizer)
    assert list(zip(prompts.token[0].tolist(), prompts.role[0].tolist(), strict=True)) == [
        ("t", "text"),
        ("o", "text"),
        ("t:", "separator"),
        (" f", "label"),
        ("\n", "separator"),
        ("o", "text"),
        ("t:", "separator"),
        (" b", "label"),
        ("\n", "separator"),
        ("t", "query"),
        ("o", "query"),
        (":", "last"),
    ]


def test_a_tokenizer_that_ends_with_a_special_token_is_refused() -> None:
    inner = Tokenizer.from_str(byte_level().backend_tokenizer.to_str())
    end = inner.token_to_id("</s>")
    inner.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", end)]
    )
    ending = PreTrainedTokenizerFast(tokenizer_object=inner)
    with pytest.raises(
        InputError, match=r"ends prompt 0 with a special token.*adds none at the end"
    ):
        _prompts(ending, TEMPLATES["plain"])


def test_special_tokens_written_in_a_text_are_text() -> None:
    tokenizer = byte_level(bos=True)
    items = [Template().prompt([("</s> cat", "x", "foo")], "<pad>", "y", "bar")]
    prompts = assemble(items, LABELS, tokenizer, control_tokens=True)
    roles = dict(zip(prompts.token[0].tolist(), prompts.role[0].tolist(), strict=True))
    assert roles["</s>"] == "text"
    assert roles["<pad>"] == "query"
    assert prompts.role[0].tolist().count("bos") == 1


def test_a_label_of_several_tokens() -> None:
    template = Template("{text}:{label}\n")
    items = [template.prompt([("cat", "x", "qux")], "dog", "x", "foo")]
    prompts = assemble(items, ("foo", "qux"), byte_level())
    pieces = byte_level()("qux")["input_ids"]
    assert len(pieces) > 1
    assert prompts.answers.token_id[0, 1].tolist() == pieces
    assert prompts.token_id[prompts.role == "label"].tolist() == pieces
    assert prompts.answers.n_tokens.tolist() == [
        [len(byte_level()("foo")["input_ids"]), len(pieces)]
    ]


def test_labels_of_one_token_together_are_refused() -> None:
    """Two labels that the tokenizer cannot tell apart."""
    inner = Tokenizer.from_str(byte_level().backend_tokenizer.to_str())
    inner.normalizer = normalizers.Lowercase()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner)
    items = [Template().prompt([("cat", "x", "foo")], "dog", "x", "foo")]
    with pytest.raises(InputError, match="'foo' and 'FOO' are the same tokens; answers must"):
        assemble(items, ("foo", "FOO"), tokenizer)


def test_a_query_that_changes_with_its_label_is_refused() -> None:
    """Where the colon and the blank are one token, the last position is no colon."""
    words = ["c", ":", " ", "f", "b", "\n", ": "]
    inner = Tokenizer(models.BPE({w: i for i, w in enumerate(words)}, [(":", " ")]))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner)
    items = [Template().prompt([("c", "x", "f")], "c", "x", "f")]
    with pytest.raises(
        InputError, match=r"with the answer 'f' after it the end of the prompt .* differently"
    ):
        assemble(items, ("f", "b"), tokenizer)


def test_a_label_that_merges_with_what_follows_is_refused() -> None:
    words = ["c", ":", "f", "b", "\n", "f\n"]
    inner = Tokenizer(models.BPE({w: i for i, w in enumerate(words)}, [("f", "\n")]))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner)
    items = [Template("{text}:{label}\n").prompt([("c", "x", "f")], "c", "x", "f")]
    with pytest.raises(InputError, match=r"prompt 0, demonstration 0: the label 'f' is tokenized"):
        assemble(items, ("f", "b"), tokenizer)


def test_the_gap_before_a_label_comes_from_a_prompt_with_demonstrations() -> None:
    """The first prompt has none; labels stand right behind the arrow."""
    template = Template("{text}->{label}\n")
    items = [
        template.prompt([], "cat", "x", "foo"),
        template.prompt([("cat", "x", "foo")], "dog", "x", "foo"),
    ]
    prompts = assemble(items, LABELS, _without_blanks())
    assert prompts.token[prompts.role == "label"].tolist() == ["foo"]


def _without_blanks() -> Any:
    """A tokenizer for which "foo" and " foo" are both one token."""
    words = [*"cat dog foo bar -> :".split(), " ", "\n", " foo", " bar"]
    characters = sorted(set("".join(words)))
    merges, vocabulary = [], list(characters)
    for word in words:
        for k in range(2, len(word) + 1):
            if (pair := (word[: k - 1], word[k - 1])) not in merges:
                merges.append(pair)
                vocabulary.append(word[:k])
    unique = {w: i for i, w in enumerate(dict.fromkeys(vocabulary))}
    inner = Tokenizer(models.BPE(unique, merges))
    inner.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=inner)


def test_roles_do_not_depend_on_what_texts_say() -> None:
    """Texts, query and instruction hold whole demonstrations; roles stay by place."""
    task = tt.Task("tricky", {"x": [f"cat{i}: foo" for i in range(6)], "y": ["bar: bar", *"defgh"]})
    model: Any = SimpleNamespace(tokenizer=byte_level(), max_positions=None)
    prompts = tt.build_prompts(model, task, LABELS, shots=2, n=4, instruction="dog: foo\n")
    assert (prompts.where("labels").sum(axis=1) == 4).all()
    for row in range(4):
        before = prompts.role[row].tolist().index("text")
        assert set(prompts.role[row, :before].tolist()) <= {"pad", "separator"}
