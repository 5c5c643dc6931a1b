"""Control tokens, a doubled BOS, and characters that a tokenizer drops or does not know."""

from __future__ import annotations

import json
from typing import Any

import pytest
from tiny import TWO, byte_level, sentencepiece, taking, tiny
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)
from transformers import PreTrainedTokenizerFast

import twotower as tt

CHAT = "<s>user {text}</s>assistant:{label}\n"


def with_texts(*odd: str) -> tt.Task:
    return tt.Task("t", {"x": [*odd, "cat", "dog", "hen"][:3], "y": ["Rome", "Oslo", "Lima"]})


def build(tokenizer: Any, *odd: str, **options: Any) -> tt.Prompts:
    return tt.build_prompts(taking(tokenizer), with_texts(*odd), shots=2, n=4, **options)


def string(text: str, bos: bool = True, **options: Any) -> tt.Prompts:
    """Prompts of one string over a model whose tokenizer adds a BOS or does not."""
    model = tt.load(tiny("llama-grouped").module, tokenizer=byte_level(bos), check=False)
    start = text.index("foo")
    return tt.prompts_from_strings(model, [text], [[(start, start + 3)]], ["foo"], **options)


# ---- control tokens ----------------------------------------------------------------


@pytest.mark.parametrize("text", ["</s>", "a</s>", "cat <pad> cat", "<s>cat"])
def test_control_tokens_in_texts(text: str) -> None:
    control = next(token for token in ("</s>", "<pad>", "<s>") if token in text)
    with pytest.raises(
        tt.errors.InputError,
        match=f"prompt . contains|prompt .: the (text|query) '{text}' contains '{control}', .* "
        "control_tokens=True",
    ):
        build(byte_level(), text)
    found = build(byte_level(), text, control_tokens=True)
    assert set(found.role[found.token == control].tolist()) <= {"text", "query"}
    assert (found.token == control).any()
    again = found.reversed_labels()
    assert (again.token == control).any()


def test_control_tokens_as_labels() -> None:
    with pytest.raises(
        tt.errors.InputError, match="'</s>' contains '</s>'|label '</s>' is one of the"
    ):
        build(byte_level(), labels=("</s>", "foo"), template="{text}:{label}\n")
    found = build(
        byte_level(), labels=("</s>", "foo"), template="{text}:{label}\n", control_tokens=True
    )
    assert found.label_ids[0] == byte_level().eos_token_id


def test_a_label_that_no_demonstration_has_is_looked_at_too() -> None:
    with pytest.raises(
        tt.errors.InputError, match="the label '</s>' is one of the tokenizer's control"
    ):
        tt.build_prompts(
            taking(byte_level()),
            TWO,
            ("foo", "</s>"),
            {"foo": 2, "</s>": 0},
            4,
            template="{text}:{label}\n",
        )


def test_control_tokens_in_template_and_instruction() -> None:
    found = build(byte_level(), template=CHAT, instruction="</s>Sort.\n")
    assert set(found.role[found.token == "</s>"].tolist()) == {"separator"}


def test_control_tokens_in_strings() -> None:
    text = "<s>cat: foo\n</s>dog:"
    with pytest.raises(tt.errors.InputError, match="prompt 0: the text '<s>cat: ' contains '<s>'"):
        string(text, bos=False)
    with pytest.raises(tt.errors.InputError, match="prompt 0: the query '.*' contains '</s>'"):
        string(text, bos=False, add_special_tokens=False)
    found = string(text, bos=False, control_tokens=True)
    assert found.token[0, 0] == "<s>"
    assert found.role[0, 0] == "text"


def test_which_added_tokens_are_control_tokens() -> None:
    """Markup is, blanks and words are not, whatever a tokenizer says of them."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(byte_level().backend_tokenizer.to_str())
    )
    tokenizer.add_tokens(["<tool>", "[INST]", "    ", "zebra"])
    tokenizer.add_tokens([AddedToken("\n\n", special=True)])
    for text in ("a <tool>", "[INST]"):
        with pytest.raises(
            tt.errors.InputError, match=r"which the tokenizer reads as one of its control"
        ):
            build(tokenizer, text)
    for text in ("a    b", "zebra", "a\n\nb", "[INST", "<>"):
        build(tokenizer, text)


def test_bytes_of_unknown_characters_are_no_control_tokens() -> None:
    """SentencePiece's byte tokens are added tokens here; written out they are refused."""
    build(sentencepiece(), "猫 é")
    with pytest.raises(tt.errors.InputError, match="contains '<0x41>'"):
        build(sentencepiece(), "a <0x41>")


# ---- a doubled BOS -----------------------------------------------------------------

DOUBLED = {
    "instruction": {"instruction": "<s>Sort.\n"},
    "template": {"template": "<s>{text}: {label}\n"},
}


@pytest.mark.parametrize("where", DOUBLED)
def test_a_doubled_bos_is_refused(where: str) -> None:
    options = DOUBLED[where]
    with pytest.raises(
        tt.errors.InputError,
        match=r"prompt 0 begins with '<s>'.*remove it.*add_special_tokens=False",
    ):
        build(byte_level(bos=True), **options)
    found = build(byte_level(bos=True), **options, add_special_tokens=False)
    for row in range(len(found)):
        own = found.role[row] != "pad"
        assert found.role[row][own].tolist().count("bos") == 1
        assert found.role[row][own][0] == "bos"
        assert found.demonstration[row][own][0] == -1
        ids = byte_level()(found.strings[row], add_special_tokens=False)["input_ids"]
        assert found.token_id[row][own].tolist() == ids
    described = found.recipe.describe()
    assert (described["add_special_tokens"], described["control_tokens"]) == (False, False)


def test_a_doubled_bos_in_a_string() -> None:
    with pytest.raises(tt.errors.InputError, match="prompt 0 begins with '<s>'"):
        string("<s>cat: foo\ndog:")
    with pytest.raises(tt.errors.InputError, match="prompt 0 begins with '<s>'"):
        string("<s>cat: foo\ndog:", control_tokens=True)
    found = string("<s>cat: foo\ndog:", add_special_tokens=False)
    assert found.token[0].tolist()[:2] == ["<s>", "c"] or found.token[0, 0] == "<s>"
    assert found.role[0].tolist().count("bos") == 1
    assert found.role[0, 0] == "bos"
    assert found.texts == {"cat:", "dog:"}
    plain = string("cat: foo\ndog:", add_special_tokens=False)
    assert "bos" not in plain.role


def test_a_bos_of_a_text_is_not_the_prompts() -> None:
    with pytest.raises(tt.errors.InputError, match="'<s>cat' contains '<s>'"):
        build(byte_level(bos=True), "<s>cat", add_special_tokens=False)


def test_changed_prompts_are_tokenized_as_they_were() -> None:
    plain = tt.build_prompts(taking(byte_level(bos=True)), TWO, shots=2, n=8)
    bare = tt.build_prompts(taking(byte_level(bos=True)), TWO, shots=2, n=8,
                            add_special_tokens=False)  # fmt: skip
    for prompts, count in ((plain, 1), (bare, 0)):
        twins = {
            "slice": prompts[2:5],
            "reversed": prompts.reversed_labels(),
            "reordered": prompts.reordered([[3, 2, 1, 0]] * 8),
            "asked": prompts.other_queries(),
            "parts": prompts.split(0.5)[1],
            "slices": prompts[[0]].reversed_labels(),
        }
        for name, twin in twins.items():
            assert ((twin.role == "bos").sum(axis=1) == count).all(), name
            assert twin.add_special_tokens is bool(count), name


def test_special_tokens_at_the_end_can_be_left_out() -> None:
    inner = Tokenizer.from_str(byte_level().backend_tokenizer.to_str())
    content = json.loads(byte_level(bos=True).backend_tokenizer.to_str())
    single = content["post_processor"]["single"]
    content["post_processor"]["single"] = single[::-1]
    inner = Tokenizer.from_str(json.dumps(content))
    ending = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>")
    with pytest.raises(tt.errors.InputError, match="ends prompt 0 .* or add_special_tokens=False"):
        build(ending)
    assert set(build(ending, add_special_tokens=False).token[:, -1].tolist()) == {":"}


@pytest.mark.parametrize("name", ["add_special_tokens", "control_tokens"])
def test_flags_are_true_or_false(name: str) -> None:
    with pytest.raises(tt.errors.InputError, match=f"{name}='no' must be True or False"):
        build(byte_level(), **{name: "no"})
    with pytest.raises(tt.errors.InputError, match=f"{name}='no' must be True or False"):
        string("cat: foo\ndog:", **{name: "no"})


# ---- characters that are lost ------------------------------------------------------


def few_characters(unknown: str | None = None, normalizer: Any = None) -> Any:
    """Single letters, and nothing for other characters or an unknown token."""
    letters = sorted(set("catdogRmeOslLihn: foobr\n\N{LATIN SMALL LETTER E WITH ACUTE}"))
    words = [*letters, " f", " b", " fo", " ba", " foo", " bar"]
    words += [] if unknown is None else [unknown]
    merges = [(" ", "f"), (" ", "b"), (" f", "o"), (" b", "a"), (" fo", "o"), (" ba", "r")]
    inner = Tokenizer(models.BPE({w: i for i, w in enumerate(words)}, merges, unk_token=unknown))
    inner.decoder = decoders.Fuse()
    if normalizer is not None:
        inner.normalizer = normalizer
    # As of GPT-2: named by transformers, but nothing that the vocabulary's model uses.
    named = {} if unknown is not None else {"unk_token": "<end>"}
    return PreTrainedTokenizerFast(tokenizer_object=inner, **named)


@pytest.mark.parametrize("text", ["c猫t", "猫", "cat\N{ZERO WIDTH SPACE}"])
def test_dropped_characters_are_named(text: str) -> None:
    lost = next(c for c in text if c not in "cat")
    with pytest.raises(
        tt.errors.InputError,
        match=rf"the tokenizer drops .* \(U\+{ord(lost):04X}\), so the model would",
    ):
        build(few_characters(), text)
    build(few_characters(), "cat cat")


def test_dropped_characters_of_a_template() -> None:
    with pytest.raises(
        tt.errors.InputError, match=r"prompt 0: the tokenizer drops '→' \(U\+2192\)"
    ):
        build(few_characters(), template="{text} →: {label}\n")


def test_unknown_characters_are_named() -> None:
    """Also where the unknown token is named by the vocabulary only."""
    with pytest.raises(
        tt.errors.InputError,
        match=r"does not know '猫' \(U\+732B\) in the (text|query) 'c猫t' .* token '<unk>' instead",
    ):
        build(few_characters("<unk>"), "c猫t")
    build(few_characters("<unk>"))


def test_unknown_characters_of_a_unigram_are_named() -> None:
    """Its unknown token has a number only."""
    words = [*"catdoghenRmOslLi: fbr\n", " foo", " bar"]
    inner = Tokenizer(models.Unigram([("?", 0.0), *((word, -2.0) for word in words)], 0, False))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner)
    with pytest.raises(
        tt.errors.InputError, match=r"does not know '猫' \(U\+732B\) .* token '\?' inst"
    ):
        build(tokenizer, "c猫t")
    build(tokenizer)


def test_characters_that_are_dropped_by_half_are_named() -> None:
    """Bytes of which the vocabulary holds some."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    text = "cat: foo\ndog: bar\nRome Oslo Lima hen é"
    inner.train_from_iterator([text] * 5, trainers.BpeTrainer(vocab_size=300, show_progress=False))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner)
    build(tokenizer, "cét")
    for lost in "è猫":
        with pytest.raises(tt.errors.InputError, match=f"drops '{lost}'"):
            build(tokenizer, f"c{lost}t")


def test_unknown_words_are_named() -> None:
    words = {w: i for i, w in enumerate("[UNK] cat dog hen Rome Oslo Lima foo bar :".split())}
    inner = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="[UNK]")
    build(tokenizer)
    with pytest.raises(tt.errors.InputError, match=r"does not know 'o' \(U\+006F\), 'w' .* 'owl'"):
        build(tokenizer, "owl")
    with pytest.raises(tt.errors.InputError, match="'x' "):
        build(tokenizer, labels=("foo", "x"))


@pytest.mark.parametrize("normalizer", [normalizers.NFC(), normalizers.NFKC()])
def test_joined_accents_are_not_lost(normalizer: Any) -> None:
    """Offsets of a letter joined with its accent leave the accent uncovered."""
    build(few_characters(normalizer=normalizer), "cafe\N{COMBINING ACUTE ACCENT}")
    with pytest.raises(tt.errors.InputError, match=r"drops '猫'"):
        build(few_characters(normalizer=normalizer), "cafe\N{COMBINING ACUTE ACCENT} 猫")


def test_what_a_normalizer_takes_out_is_lost() -> None:
    strip = normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents()])
    with pytest.raises(tt.errors.InputError, match=r"drops .*U\+0301"):
        build(few_characters(normalizer=strip), "cafe\N{COMBINING ACUTE ACCENT}")
    with pytest.raises(tt.errors.InputError, match=r"drops 'x'"):
        build(few_characters(normalizer=normalizers.Replace("x", "")), "cxat")
