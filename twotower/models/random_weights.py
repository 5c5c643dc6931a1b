"""Models of real shapes with random weights: for time and memory, where no weights are at hand.

The ordinary loader is given a state dict whose tensors come into being when it asks for
them, one after the other. So a random model is placed, quantized and offloaded by the same
code as a real one, and takes no more memory than its final size and one tensor.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zlib import crc32

import torch

from ..errors import ModelError

SHAPES = {path.stem: path for path in sorted((Path(__file__).parent / "configs").glob("*.json"))}
"""Configurations that come with the package, by name."""


def on_meta(config: Any, dtype: torch.dtype | None = None) -> Any:
    """A model without memory for its weights.

    Raises
    ------
    ModelError
        If the configuration is none of a causal language model.
    """
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
    except ValueError as error:
        reason = str(error).splitlines()[0]
        raise ModelError(f"no causal language model has this configuration: {reason}") from error


@dataclass
class RandomTensor:
    """A tensor that is made when it is read, as a slice of a safetensors file is."""

    shape: torch.Size
    dtype: torch.dtype
    spread: float
    mean: float
    seed: int

    def __getitem__(self, _everything: Any) -> torch.Tensor:
        made = torch.empty(self.shape, dtype=self.dtype)
        if not self.spread:
            return made.fill_(self.mean)
        return made.normal_(0, self.spread, generator=torch.Generator().manual_seed(self.seed))


def random_model(config: Any, dtype: torch.dtype, seed: int = 0, **options: Any) -> Any:
    """A model with random weights, from the ordinary loader.

    Parameters
    ----------
    config, dtype
        The model's.
    seed
        Decides the weights, with their names.
    **options
        What `from_pretrained` takes: `device_map`, `quantization_config`, ...
    """
    module = on_meta(config, dtype)
    state = random_state(module, dtype, seed)
    return type(module).from_pretrained(
        None, config=config, state_dict=state, dtype=dtype, **options
    )


def random_state(module: Any, dtype: torch.dtype, seed: int) -> dict[str, RandomTensor]:
    """Weights as a new model has them: normal matrices, norms of one, biases of zero."""
    tied = set(getattr(module, "all_tied_weights_keys", None) or {})
    spread = getattr(module.config, "initializer_range", None) or 0.02
    found = {}
    for name, tensor in module.state_dict().items():
        if name in tied:
            continue
        matrix = tensor.dim() > 1
        norm = not matrix and name.endswith("weight")
        found[name] = RandomTensor(
            tensor.shape, dtype, spread if matrix else 0.0, float(norm), crc32(name.encode(), seed)
        )
    return found


def synthetic_tokenizer(vocabulary: int) -> Any:
    """A byte-level tokenizer that knows the words of the bundled tasks.

    Labels of the default task, with their blank, are one token; ids stay below the
    vocabulary's size.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    from ..prompts import bundled_tasks, load_task

    found = Tokenizer(models.BPE())
    found.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    found.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=min(vocabulary, 8000),
        special_tokens=["<s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [t for name in bundled_tasks() for part in load_task(name).texts.values() for t in part]
    lines = [f"{text}: {label}\n" for text in texts for label in ("foo", "bar", "map", "key")]
    found.train_from_iterator(lines, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=found, bos_token="<s>", eos_token="<s>", pad_token="<pad>"
    )
