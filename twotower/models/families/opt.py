"""OPT, XGLM and BioGPT: position embeddings, and an MLP that is not a module of its own."""

from __future__ import annotations

from typing import Any

import torch

from ...errors import ModelError
from ..architecture import call, first
from .llama import Llama


class BioGPT(Llama):
    """BioGPT."""

    model_types = ("biogpt",)
    layers_path = "biogpt.layers"
    final_norm_path = "biogpt.layer_norm"
    unembedding_path = "output_projection"
    learned_positions_path = "biogpt.embed_positions"
    attention_norm_name = "self_attn_layer_norm"
    mlp_norm_name = "final_layer_norm"
    mlp_name = "fc1"
    projection_name = "out_proj"
    more_names = frozenset({"fc2"})
    rotary = False

    def feed_forward(self, block: Any, x: torch.Tensor) -> torch.Tensor:
        return call(block.fc2, block.activation_fn(call(block.fc1, x)))

    def mlp_output(self, block: Any) -> torch.Tensor:
        return block.fc2.output


class XGLM(BioGPT):
    """XGLM; its position embedding is fixed, not learned."""

    model_types = ("xglm",)
    layers_path = "model.layers"
    final_norm_path = "model.layer_norm"
    unembedding_path = "lm_head"
    learned_positions_path = "model.embed_positions"

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.d_mlp = config.ffn_dim


class OPT(BioGPT):
    """OPT; the model flattens prompts and positions to one dimension before the MLP."""

    model_types = ("opt",)
    layers_path = "model.decoder.layers"
    final_norm_path = "model.decoder.final_layer_norm"
    unembedding_path = "lm_head"
    learned_positions_path = "model.decoder.embed_positions"

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.d_mlp = config.ffn_dim
        if config.word_embed_proj_dim not in (None, self.d_model):
            raise ModelError(
                "this OPT model has a projection between the final norm and the unembedding "
                f"(word_embed_proj_dim={config.word_embed_proj_dim}), which is not supported"
            )

    def mlp_output(self, block: Any) -> torch.Tensor:
        output = block.fc2.output
        return output.view(first(block.output).shape)
