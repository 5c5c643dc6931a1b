"""Small random models of every architecture, and tokenizers, made on the spot.

Weights are drawn large enough that attention is far from uniform, and biases and norms are
random too, so that leaving one out shows.
"""

from __future__ import annotations

import io
from collections.abc import Container, Iterable
from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPTJConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    PhiConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

import twotower as tt

WORDS = (
    "cat dog owl cow hen ape Paris Rome Oslo Kyoto Lima Cairo hammer saw drill "
    "foo bar map key cup one two"
).split()
ANIMALS = ["cat", "dog", "owl", "cow", "hen", "ape", "black bear", "elephant", "sea lion", "yak"]
CITIES = [
    "Paris",
    "Rome",
    "Oslo",
    "Kyoto",
    "Lima",
    "Cairo",
    "New York",
    "Timbuktu",
    "La Paz",
    "Ulm",
]
TOOLS = ["hammer", "saw", "drill", "pair of tongs", "plane", "chisel", "file", "axe", "vice", "awl"]

TWO = tt.Task("animals-cities-tiny", {"animal": ANIMALS, "city": CITIES})
THREE = tt.Task("three-tiny", {"animal": ANIMALS, "city": CITIES, "tool": TOOLS})

_LINES = [f"{word}: {label}\n" for word in WORDS for label in ("foo", "bar", "map", "key")] * 4


@cache
def byte_level(bos: bool = False) -> PreTrainedTokenizerFast:
    """Byte-level BPE as GPT-2's; labels with their leading space are one token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(_LINES, trainer)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


@cache
def sentencepiece() -> PreTrainedTokenizerFast:
    """SentencePiece-like BPE as Llama's: a mark for blanks, byte fallback, BOS added."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))],
    )
    tokenizer.train_from_iterator((f"{w} : {x}" for w in WORDS for x in WORDS), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


@cache
def sentencepiece_model() -> bytes:
    """What stands in a Llama's tokenizer.model, trained on the spot."""
    import sentencepiece as library

    lines = [f"{word}: {label}" for word in [*WORDS, "elephant", "New York"] for label in WORDS]
    buffer = io.BytesIO()
    library.SentencePieceTrainer.train(
        sentence_iterator=iter(lines * 3),
        model_writer=buffer,
        vocab_size=390,
        model_type="bpe",
        byte_fallback=True,
        hard_vocab_limit=False,
        character_coverage=1.0,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
        num_threads=1,
    )
    return buffer.getvalue()


def _configurations() -> dict[str, Any]:
    llama = {
        "hidden_size": 48,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": 256,
        "head_dim": 12,
    }
    neox = {k: v for k, v in llama.items() if k != "head_dim"}
    neox |= {
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.5,
        }
    }
    gpt = {"n_embd": 48, "n_layer": 3, "n_head": 4, "n_positions": 256}
    off = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
    return {
        "gpt2": GPT2Config(**gpt, **off),
        "gptj": GPTJConfig(**gpt, **off, rotary_dim=8),
        "llama": LlamaConfig(**llama, num_key_value_heads=4),
        "llama-grouped": LlamaConfig(**llama, num_key_value_heads=2, attention_bias=True),
        "mistral": MistralConfig(**llama, num_key_value_heads=2, sliding_window=12),
        "qwen2": Qwen2Config(
            **{k: v for k, v in llama.items() if k != "head_dim"}, num_key_value_heads=2
        ),
        "qwen3": Qwen3Config(**llama, num_key_value_heads=2),
        "neox-parallel": GPTNeoXConfig(**neox, use_parallel_residual=True),
        "neox-sequential": GPTNeoXConfig(**neox, use_parallel_residual=False),
    }


def _further() -> dict[str, Any]:
    """Architectures that are compared with transformers' own forward alone."""
    return {
        "phi": PhiConfig(
            hidden_size=48,
            intermediate_size=64,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=256,
            rope_parameters={
                "rope_type": "default",
                "rope_theta": 10000.0,
                "partial_rotary_factor": 0.5,
            },
        ),
    }


ARCHITECTURES = list(_configurations())
FURTHER = list(_further())

TRANSPORTED = ("gpt2", "gptj", "llama-grouped")
"""Architectures on which `make test` proves devices, offloading, servers and that nothing waits:
learned positions, parallel blocks, and grouped queries."""

MIXED = ("lfm2", "falcon_h1", "qwen3_5_text")
"""Models of `families.py` with mixers: convolutions, state spaces beside heads, and delta rules."""


def mixed() -> list[Any]:
    """Return `MIXED` as parameters; all but the quickest, the delta rule, are marked as slow."""
    return [pytest.param(x, marks=pytest.mark.slow) if x != MIXED[-1] else x for x in MIXED]


CONTAINED = ("llama", "qwen2", "qwen3", "neox-sequential", "neox-parallel")
"""Architectures whose parts all occur in others, or in those that `models/test_families.py`
compares with transformers' own forward; `make test` leaves them out of most tests."""


def transported() -> list[Any]:
    """Return all architectures as parameters, those beyond `TRANSPORTED` marked as slow."""
    return _slow(set(ARCHITECTURES) - set(TRANSPORTED))


def distinct() -> list[Any]:
    """Return all architectures as parameters, those of `CONTAINED` marked as slow."""
    return _slow(set(CONTAINED))


DISTINCT = tuple(name for name in ARCHITECTURES if name not in CONTAINED)


def crossed(
    values: Iterable[Any],
    everywhere: Container[Any] = (),
    on: Container[str] = TRANSPORTED,
    rare: Container[Any] = (),
) -> list[Any]:
    """Return all (architecture, value), as parameters of two arguments.

    `make test` takes every value but those of `rare` on a grouped-query Llama, and those of
    `everywhere` on the architectures `on`; the rest is marked as slow.
    """
    found = []
    for name in ARCHITECTURES:
        for value in values:
            taken = name == TRANSPORTED[-1] and value not in rare
            taken |= name in on and value in everywhere
            found.append(pytest.param(name, value, marks=() if taken else pytest.mark.slow))
    return found


def _slow(names: set[str]) -> list[Any]:
    return [pytest.param(x, marks=pytest.mark.slow) if x in names else x for x in ARCHITECTURES]


def wide_config(name: str, width: int) -> Any:
    """The configuration of a small model, as wide as quantization needs it."""
    config = hf_model(name).config
    for key in ("hidden_size", "n_embd"):
        if hasattr(config, key):
            setattr(config, key, width)
    if hasattr(config, "head_dim"):
        config.head_dim = width // 4
    return config


def hf_model(
    name: str, attention: str = "eager", seed: int = 0, dtype: torch.dtype = torch.float32
) -> Any:
    """A random transformers model of an architecture, in evaluation mode; or of `families.py`."""
    if name not in ARCHITECTURES + FURTHER:
        from families import family_model

        return family_model(name).to(dtype)
    config = (_configurations() | _further())[name]
    config.vocab_size = 704
    return with_random_weights(config, attention, seed, dtype)


def with_random_weights(
    config: Any, attention: str = "eager", seed: int = 0, dtype: torch.dtype = torch.float32
) -> Any:
    """A random transformers model of a configuration, in evaluation mode."""
    config.pad_token_id = config.bos_token_id = config.eos_token_id = 0
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=dtype)
    draw_weights(model)
    return model.eval().requires_grad_(False)


def draw_weights(model: Any) -> None:
    """Draw weights in place: norms away from 1 and biases from 0, so that leaving one out shows."""
    with torch.no_grad():
        for label, parameter in model.named_parameters():
            noise = torch.randn_like(parameter)
            if parameter.dim() == 1:
                parameter.copy_((0 if label.endswith("bias") else 1) + 0.2 * noise)
            else:
                parameter.copy_(0.18 * noise)


def random_llama(tokenizer: Any, layers: int, heads: int) -> tt.Model:
    """A loaded random Llama 64 wide, with four query heads to a key-value head."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 4,
        max_position_embeddings=2048,
    )
    return tt.load(with_random_weights(config), tokenizer=tokenizer)


def taking(tokenizer: Any) -> Any:
    """Return a stand-in for a model that builds prompts: a tokenizer, and no limit of length."""
    return SimpleNamespace(tokenizer=tokenizer, max_positions=None)


@cache
def tiny(name: str, attention: str = "eager") -> tt.Model:
    """A loaded random model of an architecture; the same object every time."""
    return tt.load(hf_model(name, attention), tokenizer=byte_level())
