"""Random models of given shapes, and a tokenizer for them: speed does not ask for sense."""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    PreTrainedTokenizerFast,
)

import twotower as tt
from twotower.models import Model
from twotower.prompts import Prompts

LABELS = ("foo", "bar", "map", "key")
TASK = "news-topics"
SMALL_VOCABULARY = 2000


def llama(layers: int, heads: int, width: int, mlp: int, vocabulary: int) -> LlamaConfig:
    return LlamaConfig(
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        hidden_size=width,
        intermediate_size=mlp,
        vocab_size=vocabulary,
        max_position_embeddings=2048,
    )


def gpt2(layers: int, heads: int, width: int, vocabulary: int) -> GPT2Config:
    return GPT2Config(
        n_layer=layers,
        n_head=heads,
        n_embd=width,
        vocab_size=vocabulary,
        n_positions=2048,
        bos_token_id=0,
        eos_token_id=0,
    )


def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE that knows the task's words; labels with their blank are one token."""
    found = Tokenizer(models.BPE())
    found.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    found.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=SMALL_VOCABULARY,
        special_tokens=["<s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [text for part in tt.load_task(TASK).texts.values() for text in part]
    lines = [f"{text}: {label}\n" for text in texts for label in LABELS]
    found.train_from_iterator(lines, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=found, bos_token="<s>", eos_token="<s>", pad_token="<pad>"
    )


def random_model(config: Any, device: str, dtype: torch.dtype) -> Model:
    """A random model, made on the device."""
    torch.manual_seed(0)
    with torch.device(device):
        module = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return tt.load(module.eval().requires_grad_(False), tokenizer=tokenizer())


def prompts_near(model: Model, length: int, n: int) -> Prompts:
    """Prompts of the bundled task with about so many tokens."""
    task = tt.load_task(TASK)
    most = min(map(len, task.texts.values())) - 1
    found = None
    for shots in range(1, most + 1):
        more = tt.build_prompts(model, task, LABELS, shots, n)
        if found is not None and more.lengths.mean() - length > length - found.lengths.mean():
            break
        found = more
    return found
