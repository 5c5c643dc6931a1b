"""Prompts and roles with tokenizers of the families' own classes, trained here in miniature."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
import transformers
from tiny import ANIMALS, CITIES, THREE, TOOLS, WORDS, taking
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

import twotower as tt

TIKTOKEN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""The pattern of Llama 3 and, with other rules for letters, of gpt-oss, Phi-4 and Tekken."""

TEXTS = [*ANIMALS, *CITIES, *TOOLS, *WORDS]
LINES = [f"{text}: {label}\n" for text in TEXTS for label in ("foo", "bar", "map")] * 8


def tiktoken_style() -> Any:
    """A byte-level BPE with tiktoken's pattern and a BOS, as Llama 3's and Tekken's."""
    found = Tokenizer(models.BPE(ignore_merges=True))
    found.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(TIKTOKEN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    found.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<|begin|>", "<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    found.train_from_iterator(LINES, trainer)
    found.post_processor = processors.TemplateProcessing(
        single="<|begin|> $A", special_tokens=[("<|begin|>", 0)]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=found, bos_token="<|begin|>", eos_token="<|end|>"
    )


PIECES = [part for text in TEXTS for part in (text, f" {text}", ":", "\n")] * 8
PIECES += [" foo", " bar", " map"] * 20
"""Words by themselves: SentencePiece does not merge across words, which these trainers would."""

CLASSES = ["GemmaTokenizer", "LlamaTokenizer", "Qwen2Tokenizer", "CohereTokenizer"]
CLASSES += ["GPTNeoXTokenizer", "tiktoken"]


@cache
def trained(name: str) -> Any:
    """A tokenizer of transformers' own class for a family, trained on a few lines."""
    if name == "tiktoken":
        return tiktoken_style()
    lines = PIECES if name in ("GemmaTokenizer", "LlamaTokenizer") else LINES
    return getattr(transformers, name)().train_new_from_iterator(lines, 600)


@pytest.mark.parametrize("name", CLASSES)
def test_every_token_has_its_role(name: str) -> None:
    tokenizer = trained(name)
    prompts = tt.build_prompts(taking(tokenizer), THREE, shots=2, n=6, seed=1)
    for number, string in enumerate(prompts.strings):
        ids = [int(x) for x in prompts.token_id[number] if x >= 0]
        assert ids == tokenizer(string)["input_ids"]
        roles = prompts.role[number][-len(ids) :]
        at = np.flatnonzero(roles == "label")
        assert len(at) == 6
        labels = [tokenizer.decode([ids[i]]).strip() for i in at]
        shown = prompts.label_text[number][-len(ids) :][at]
        assert labels == list(shown)
        assert roles[-1] == "last"
        # The texts of tokens make up the prompt, with all its spaces.
        texts = prompts.token[number][-len(ids) :]
        assert "".join(texts[roles != "bos"]) == string
        starts = tokenizer.bos_token_id is not None and ids[0] == tokenizer.bos_token_id
        assert (roles[0] == "bos") == starts
        # The texts between labels are those of the task.
        text = tokenizer.decode([ids[i] for i in np.flatnonzero(roles == "query")]).strip()
        assert text in TEXTS


@pytest.mark.parametrize("name", CLASSES)
def test_labels_are_the_tokens_that_follow(name: str) -> None:
    """A label's id is the token that its text becomes after a prompt."""
    tokenizer = trained(name)
    prompts = tt.build_prompts(taking(tokenizer), THREE, shots=1, n=3, seed=2)
    for string in prompts.strings:
        before = len(tokenizer(string)["input_ids"])
        for label, token in zip(prompts.labels, prompts.label_ids, strict=True):
            assert tokenizer(f"{string} {label}")["input_ids"][before] == token
