"""TransformerLens's bridge around the weights of a model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tiny import byte_level

import twotower as tt


def bridge_of(module: torch.nn.Module, folder: Path) -> Any:
    """Return the bridge around a copy of a transformers model, which is saved in the folder."""
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import AutoModelForCausalLM, AutoTokenizer

    module.save_pretrained(folder)
    byte_level().save_pretrained(folder)
    own = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    return TransformerBridge.boot_transformers(
        str(folder), hf_model=own, tokenizer=AutoTokenizer.from_pretrained(folder), device="cpu"
    )


def ids(prompts: tt.Prompts, number: int) -> torch.Tensor:
    """Return (1, T) the tokens of a prompt, without padding."""
    tokens = prompts.token_id[number]
    return torch.tensor(tokens[tokens >= 0])[None]


def zero(n_heads: int, head: int, positions: slice) -> Callable[[torch.Tensor, Any], torch.Tensor]:
    """Return a hook on z that sets one of the layer's heads to zero."""

    def hook(z: torch.Tensor, hook: Any) -> torch.Tensor:
        # The bridge has z in one dimension or by head, with latent attention in other pieces.
        by_head = z.flatten(2).unflatten(-1, (n_heads, -1)).clone()
        by_head[:, positions, head] = 0
        return by_head.reshape(z.shape)

    return hook
