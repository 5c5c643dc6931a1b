"""Prompts belong to a tokenizer: other models refuse them, and tokens they cannot embed."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from surface import under
from tiny import TWO, byte_level, hf_model, sentencepiece, tiny
from tokenizers import AddedToken, Tokenizer, normalizers
from transformers import PreTrainedTokenizerFast

import twotower as tt
from twotower.prompts import tokenizers
from twotower.prompts.answers import Answers
from twotower.results.provenance import tokenizer_hash


def copy_of(tokenizer: Any, change: Callable[[dict[str, Any]], None] | None = None) -> Any:
    """The same tokenizer as another object, or one that differs a little."""
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    if change is not None:
        change(content)
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(content)),
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
    )


def swapped(first: str, second: str) -> Any:
    """A tokenizer in which two tokens have each other's id."""

    def change(content: dict[str, Any]) -> None:
        ids = content["model"]["vocab"]
        ids[first], ids[second] = ids[second], ids[first]

    return copy_of(byte_level(), change)


def loaded(tokenizer: Any, rows: int | None = None) -> tt.Model:
    module = hf_model("llama-grouped")
    if rows is not None:
        module.resize_token_embeddings(rows)
    return tt.load(module, tokenizer=tokenizer, check=False)


@pytest.fixture(scope="module")
def other() -> tt.Model:
    """A model that reads another token where these prompts have a colon."""
    return loaded(swapped(":", "x"))


USES: dict[str, Callable[[tt.Model, tt.Prompts, tt.Prompts], Any]] = {
    "predict": lambda m, own, p: tt.predict(m, p),
    "analyze": lambda m, own, p: tt.analyze(m, p),
    "head effects": lambda m, own, p: tt.head_effects(m, p),
    "residual streams": lambda m, own, p: tt.measures.residual.residual_streams(m, p),
    "gradients": lambda m, own, p: tt.attribution_patching(m, p),
    "a mean": lambda m, own, p: tt.head_effects(m, own, to=tt.Mean(p)),
    "donors": lambda m, own, p: tt.head_effects(m, own, to=tt.From(p)),
    "groups": lambda m, own, p: tt.group_effects(m, own, [[(0, 0)]], to=tt.Resample(p)),
    "corrupted": lambda m, own, p: tt.causal_tracing(m, own, p),
    "a knock-out": lambda m, own, p: tt.predict(
        m, own, tt.KnockOut([(0, 0)], positions="all", to=tt.Mean(p))
    ),
    "patched z": lambda m, own, p: tt.predict(m, own, tt.KnockOut([(0, 0)], "last", to=tt.From(p))),
    "patched values": lambda m, own, p: tt.predict(m, own, tt.Patch([(0, 0)], p, "values")),
    "patched attention": lambda m, own, p: tt.predict(m, own, tt.Patch([(0, 0)], p, "attention")),
}


@pytest.mark.parametrize("use", USES)
def test_prompts_of_another_tokenizer_are_refused(
    use: str, other: tt.Model, prompts: tt.Prompts
) -> None:
    own = tt.build_prompts(other, TWO, shots=3, n=6, seed=1)
    place = prompts.token[0].tolist().index(":") - int((prompts.role[0] == "pad").sum())
    known, wrong = byte_level().convert_tokens_to_ids(["x", ":"])
    with pytest.raises(
        tt.errors.InputError,
        match=rf"before it was changed: token {place} of prompt 0 is ':' \(id {wrong}\) there and "
        rf"'x' \(id {wrong}\) with this model|is ':' \(id {wrong}\) there and ':' \(id {known}\)",
    ):
        USES[use](other, own, prompts)


def test_the_same_tokenizer_as_another_object(prompts: tt.Prompts) -> None:
    again = copy_of(byte_level())
    again(["a", "b c"], padding=True, truncation=True, max_length=5)  # leaves its mark
    assert again.backend_tokenizer.to_str() != byte_level().backend_tokenizer.to_str()
    assert tokenizer_hash(again) == tokenizer_hash(byte_level())
    model = loaded(again)
    found = tt.predict(model, prompts)
    assert found.attrs["tokenizer_hash"] == tokenizer_hash(byte_level())
    assert found.logit.equals(tt.predict(tiny("llama-grouped"), prompts).logit)
    tt.predict(model, pickle.loads(pickle.dumps(prompts[:2])))


def test_tokens_that_were_only_added(prompts: tt.Prompts, monkeypatch: pytest.MonkeyPatch) -> None:
    more = copy_of(byte_level())
    before = tokenizer_hash(more)
    more.add_tokens(["zebra"])
    assert tokenizer_hash(more) != before
    model = loaded(more)
    tt.predict(model, prompts)
    # Found out once.
    monkeypatch.setattr(tokenizers, "encode", None)
    tt.predict(model, prompts)
    with pytest.raises(TypeError):
        tt.predict(model, prompts[:2])


def test_an_added_token_that_stands_in_the_prompts() -> None:
    prompts = tt.build_prompts(tiny("llama-grouped"), TWO, shots=3, n=8)
    more = copy_of(byte_level())
    more.add_tokens(["elephan"])
    model = loaded(more)
    holds = ["elephant" in text for text in prompts.strings]
    assert 0 < sum(holds) < 8
    with pytest.raises(
        tt.errors.InputError,
        match=f"token .* of prompt {holds.index(True)} is .*'elephan' .* with this",
    ):
        tt.predict(model, prompts)
    tt.predict(model, prompts[[not held for held in holds]])


def test_a_label_that_has_another_id_after_the_prompts() -> None:
    """Both labels are tokens that stand in no demonstration."""
    model = tiny("llama-grouped")
    strings, spans = ["cat: foo\ndog:"], [[(5, 8)]]
    given = {"gold": ["foo"], "labels": ["foo"]}
    prompts = tt.prompts_from_strings(model, strings, spans, **given)
    ids = [[[*prompts.label_ids], byte_level()(" key")["input_ids"]]]
    answers = Answers(np.array([["foo", "key"]], dtype=object), np.array(ids))
    prompts = replace(prompts, labels=("foo", "key"), answers=answers)
    with pytest.raises(
        tt.errors.InputError, match="tokens of 'key' have the ids .* there and .* with this"
    ):
        tt.predict(loaded(swapped("Ġkey", "Ġmap")), prompts)


def test_special_tokens_of_the_prompts_are_compared_as_they_were_made() -> None:
    """Prompts without BOS are right for a tokenizer that adds one, if made so."""
    bare = tt.build_prompts(tiny("llama-grouped"), TWO, shots=1, n=2)
    adding = loaded(byte_level(bos=True))
    with pytest.raises(tt.errors.InputError, match=r"token 0 of prompt 0 is .* there and '<s>'"):
        tt.predict(adding, bare)
    made_so = tt.build_prompts(tiny("llama-grouped"), TWO, shots=1, n=2, add_special_tokens=False)
    assert made_so.strings == bare.strings
    tt.predict(adding, made_so)


def test_an_unlike_tokenizer_is_refused(prompts: tt.Prompts) -> None:
    with pytest.raises(tt.errors.InputError, match="before it was changed: token 0 of prompt 0"):
        tt.predict(loaded(sentencepiece()), prompts)


# ---- sizes -------------------------------------------------------------------------


def larger() -> Any:
    """A tokenizer with more tokens than the model has rows, padding among them."""
    tokenizer = copy_of(byte_level())
    missing = 704 - len(tokenizer)
    tokenizer.add_tokens([AddedToken(f"w{i:03}") for i in range(missing)])
    tokenizer.add_tokens(["zzz"])
    tokenizer.add_special_tokens({"pad_token": "<new>"})
    assert tokenizer.convert_tokens_to_ids("zzz") == 704
    return tokenizer


def test_tokens_beyond_the_embedding() -> None:
    model = loaded(larger())
    prompts = tt.build_prompts(model, TWO, shots=1, n=2, template="zzz{text}: {label}\n")
    message = (
        "the token 'zzz' has the id 704 and the model's embedding has 704 rows; resize it "
        r"\(model.resize_token_embeddings"
    )
    with pytest.raises(tt.errors.InputError, match=message):
        tt.predict(model, prompts)
    tt.predict(loaded(larger(), rows=706), prompts)


def test_a_label_beyond_the_unembedding() -> None:
    model = loaded(larger())
    label = tt.build_prompts(model, TWO, ["zzz", "foo"], 1, 2, template="{text}:{label}\n")
    with pytest.raises(
        tt.errors.InputError, match="'zzz' has the id 704 and the model's embedding has"
    ):
        tt.predict(model, label)
    wide = loaded(larger(), rows=706)
    wide.module.lm_head = model.module.lm_head
    with pytest.raises(
        tt.errors.InputError, match="answer's token 'zzz' .* unembedding has 704 rows"
    ):
        tt.predict(wide, label)


@pytest.mark.parametrize("change", ["normalizer", "tokens"])
def test_a_tokenizer_that_changed_since_is_refused(change: str) -> None:
    tokenizer = copy.deepcopy(byte_level())
    model = tt.load(hf_model("llama-grouped"), tokenizer=tokenizer)
    prompts = tt.build_prompts(model, TWO, shots=1, n=3)
    expected = tt.predict(model, prompts)
    if change == "normalizer":
        tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    else:
        tokenizer.add_tokens([" foo"])
    with pytest.raises(tt.errors.InputError, match="or with this one before it was changed"):
        tt.predict(model, prompts)
    again = tt.load(model.module, tokenizer=copy.deepcopy(byte_level()))
    np.testing.assert_array_equal(tt.predict(again, prompts)["margin"], expected["margin"])
    with pytest.raises(tt.errors.InputError, match="or with this one before it was changed"):
        tt.predict(tt.load(model.module, tokenizer=copy.deepcopy(tokenizer)), prompts[:2])


def test_padding_beyond_the_embedding_does_no_harm() -> None:
    model = loaded(larger())
    assert model.tokenizer.pad_token_id == 705
    prompts = tt.build_prompts(model, TWO, shots=1, n=4)
    assert len(set(prompts.lengths)) > 1
    one_by_one = under(tt.predict, model, prompts, batch_size=1)
    together = under(tt.predict, model, prompts, batch_size=4)
    assert abs(together.logit - one_by_one.logit).max() < 1e-4
