"""Models of real shapes with random weights, to measure time and memory without real weights.

The transformers loader gets a state dict whose tensors are made one by one, when it reads them.
So the same code places, quantizes and offloads random and real models. Peak memory is the final
size plus one tensor.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zlib import crc32

import torch

from ..errors import ModelError

SHAPES = {path.stem: path for path in sorted((Path(__file__).parent / "configs").glob("*.json"))}
"""Bundled configurations, by name."""


def on_meta(config: Any, dtype: torch.dtype | None = None) -> Any:
    """Make a model on the meta device, without memory for its weights.

    Raises
    ------
    ModelError
        If the configuration is not that of a causal language model.
    """
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            kind = _language_model(config)
            if kind is not None:
                return kind._from_config(config, dtype=dtype)
            return AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
    except ValueError as error:
        reason = str(error).splitlines()[0]
        raise ModelError(f"no causal language model has this configuration: {reason}") from error


def _language_model(config: Any) -> Any | None:
    """Return the class of the language model inside a larger model, for its part's configuration.

    None if transformers finds the class by itself.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING as KNOWN

    if type(config) in KNOWN:
        return None
    return next((kind for kind in KNOWN.values() if kind.config_class is type(config)), None)


@dataclass
class RandomTensor:
    """A tensor made when it is read, like a slice of a safetensors file."""

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
    """Make a model with random weights, with the transformers loader.

    Parameters
    ----------
    config, dtype
        Configuration and dtype of the model.
    seed
        Seed of the weights, combined with their names.
    **options
        Arguments of `from_pretrained`: `device_map`, `quantization_config`, ...
    """
    module = on_meta(config, dtype)
    state = random_state(module, dtype, seed)
    return type(module).from_pretrained(
        None, config=config, state_dict=state, dtype=dtype, **options
    )


def random_state(module: Any, dtype: torch.dtype, seed: int) -> dict[str, RandomTensor]:
    """Return initial weights by name: normal matrices, norms of one, biases of zero."""
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
    """Make a byte-level tokenizer trained on the words of the bundled tasks.

    Each label of the default task, with its leading space, is one token. Ids are below
    `vocabulary`.
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
