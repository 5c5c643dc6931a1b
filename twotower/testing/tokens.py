"""A whole-word tokenizer for planted models: every text, label and sign is one token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

LABELS = ("foo", "bar", "map", "key", "cup", "log", "pin", "hat")
SIGNS = ("<unk>", "<pad>", ":", "\n")


def words(n_classes: int, n_texts: int) -> dict[str, list[str]]:
    """Make texts by class: a0, a1, ... of class a, b0, ... of class b."""
    names = [chr(ord("a") + c) for c in range(n_classes)]
    return {name: [f"{name}{i}" for i in range(n_texts)] for name in names}


def make_tokenizer(texts: Sequence[str], labels: Sequence[str]) -> Any:
    """Make a fast tokenizer for the signs, the texts, and the labels with a leading space."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = [*SIGNS, *texts, *(f" {label}" for label in labels)]
    ids = {token: i for i, token in enumerate(vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r" ?\w+|:|\n"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        pad_token="<pad>",
        eos_token="<pad>",
        clean_up_tokenization_spaces=False,
    )
