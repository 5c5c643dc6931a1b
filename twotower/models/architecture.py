"""Base class of architecture adapters.

An adapter names the submodules of a model and describes how a block computes. It calls modules
and never computes with their weights. The same code therefore reads plain, quantized, offloaded
and remote models. Every method takes nnsight envoys or plain modules.

Shapes use B prompts, T positions, H query heads, K key-value heads, D = d_head.
"""

from __future__ import annotations

import abc
import re
from typing import Any, ClassVar

import torch
from jaxtyping import Float

from ..errors import ModelError


class Architecture(abc.ABC):
    """Layout of one family of transformers.

    Parameters
    ----------
    config
        The transformers configuration of the model.
    """

    model_types: ClassVar[tuple[str, ...]]
    """`config.model_type` values with this layout."""

    layers_path: ClassVar[str]
    """Path of the list of blocks, from the root module."""

    final_norm_path: ClassVar[str]
    """Path of the norm before the unembedding, from the root module."""

    unembedding_path: ClassVar[str]
    """Path of the unembedding, from the root module."""

    attention_norm_name: ClassVar[str]
    mlp_norm_name: ClassVar[str]
    attention_name: ClassVar[str]
    mlp_name: ClassVar[str] = "mlp"
    """Names of a block's parts."""

    qkv_names: ClassVar[tuple[str, ...]]
    """The attention module's projections to queries, keys and values, in the order they run."""

    projection_name: ClassVar[str]
    """The attention module's output projection; its input is z, the heads' outputs."""

    interleaved_rotary: ClassVar[bool] = False
    """Whether rotary embedding pairs neighbouring elements (GPT-J) or the two halves (Llama).

    The tables must pair the same elements; if a model's do not, override `rotary_tables` too.
    """

    learned_positions_path: ClassVar[str | None] = None
    """Path of the learned position embedding, from the root module; None without one."""

    def __init__(self, config: Any) -> None:
        self.config = config
        self.n_layers: int = config.num_hidden_layers
        self.n_heads: int = config.num_attention_heads
        self.n_kv_heads: int = getattr(config, "num_key_value_heads", None) or self.n_heads
        self.d_model: int = config.hidden_size
        self.d_head: int = getattr(config, "head_dim", None) or self.d_model // self.n_heads
        self.d_mlp: int = (
            getattr(config, "intermediate_size", None)
            or getattr(config, "n_inner", None)
            or 4 * self.d_model
        )
        self.vocabulary_size: int = config.vocab_size
        self.max_positions: int | None = getattr(config, "max_position_embeddings", None)

    # ---- places -----------------------------------------------------------------

    def layers(self, root: Any) -> Any:
        """Return the list of blocks."""
        return resolve(root, self.layers_path)

    def final_norm(self, root: Any) -> Any:
        """Return the norm before the unembedding."""
        return resolve(root, self.final_norm_path)

    def unembedding(self, root: Any) -> Any:
        """Return the unembedding: the map from the normed residual stream to logits."""
        return resolve(root, self.unembedding_path)

    def learned_positions(self, root: Any) -> Any | None:
        """Return the learned position embedding; None for rotary positions."""
        return resolve(root, self.learned_positions_path) if self.learned_positions_path else None

    def attention(self, block: Any) -> Any:
        """Return the attention module of a block."""
        return getattr(block, self.attention_name)

    def attention_norm(self, block: Any) -> Any:
        """Return the norm before attention."""
        return getattr(block, self.attention_norm_name)

    def mlp_norm(self, block: Any) -> Any:
        """Return the norm before the MLP; in GPT-J attention shares it."""
        return getattr(block, self.mlp_norm_name)

    def mlp(self, block: Any) -> Any:
        """Return the MLP of a block."""
        return getattr(block, self.mlp_name)

    def projection(self, block: Any) -> Any:
        """Return the output projection; its input concatenates the heads' outputs."""
        return getattr(self.attention(block), self.projection_name)

    def qkv(self, block: Any) -> list[Any]:
        """Return the projections to queries, keys and values."""
        attention = self.attention(block)
        return [getattr(attention, name) for name in self.qkv_names]

    # ---- how a block computes -----------------------------------------------------

    @property
    def parallel(self) -> bool:
        """Whether attention and MLP both read the block's input (parallel block)."""
        return False

    @abc.abstractmethod
    def split(
        self, block: Any, projected: list[torch.Tensor]
    ) -> tuple[
        Float[torch.Tensor, "*rest H D"],
        Float[torch.Tensor, "*rest K D"],
        Float[torch.Tensor, "*rest K D"],
    ]:
        """Return queries, keys and values of every head, from the outputs of `qkv`.

        Parameters
        ----------
        block
            The block, needed if heads are normed after the projection (Qwen3).
        projected
            Outputs of the modules of `qkv`, each (..., features).

        Returns
        -------
        tuple of Tensor
            Queries (..., H, D), keys and values (..., K, D), before rotary.
        """

    def rotary_tables(
        self, attention: Any
    ) -> tuple[Float[torch.Tensor, "B T rotated"], Float[torch.Tensor, "B T rotated"]] | None:
        """Return cosines and sines (B or 1, T, rotated elements) of a block; None without rotary.

        They are read from the attention module's inputs inside a trace. Scaled and per-layer
        rotary embeddings therefore come from the model itself.
        """
        cos, sin = attention.inputs[1]["position_embeddings"]
        return cos, sin

    def rotate(
        self,
        x: Float[torch.Tensor, "*rest heads D"],
        cos: Float[torch.Tensor, "*#rest 1 rotated"],
        sin: Float[torch.Tensor, "*#rest 1 rotated"],
    ) -> Float[torch.Tensor, "*rest heads D"]:
        """Apply rotary embedding to x (..., heads, D), with tables (..., 1, rotated elements)."""
        rotated = cos.shape[-1]
        head, rest = x[..., :rotated], x[..., rotated:]
        if self.interleaved_rotary:
            turned = torch.stack((-head[..., 1::2], head[..., ::2]), dim=-1).flatten(-2)
        else:
            half = rotated // 2
            turned = torch.cat((-head[..., half:], head[..., :half]), dim=-1)
        out = head * cos + turned * sin
        return torch.cat((out, rest), dim=-1) if rest.shape[-1] else out

    def scaling(self, layer: int) -> float:
        """Return the factor on q.k before the softmax."""
        return float(self.d_head**-0.5)

    def window(self, layer: int) -> int | None:
        """Return how many positions a query attends to, its own included; None for all."""
        return None

    def of_a_layer(self, name: str) -> bool:
        """Check that a checkpoint weight belongs to a layer and is not a buffer of old files."""
        layers = self.layers_path.rpartition(".")[2]
        buffers = ("rotary_emb.inv_freq", "attn.bias", "masked_bias", "attention.bias")
        return bool(re.search(rf"(^|\.){layers}\.\d+\.", name)) and not name.endswith(buffers)

    @property
    def norm_epsilon(self) -> float:
        """Epsilon under the square root of the final norm."""
        for name in ("rms_norm_eps", "layer_norm_epsilon", "layer_norm_eps", "norm_epsilon"):
            if getattr(self.config, name, None) is not None:
                return float(getattr(self.config, name))
        raise ModelError(f"{type(self.config).__name__} has no epsilon for its norms")

    # ---- recognition ----------------------------------------------------------------

    @classmethod
    def block_names(cls) -> set[str]:
        """Return the names of all submodules with parameters in a block."""
        return {cls.attention_norm_name, cls.mlp_norm_name, cls.attention_name, cls.mlp_name}

    @classmethod
    def attention_names(cls) -> set[str]:
        """Return the names of all submodules with parameters in an attention module."""
        return {*cls.qkv_names, cls.projection_name}

    @classmethod
    def misfit(cls, module: torch.nn.Module) -> str | None:
        """Return why a plain module does not have this layout; None if it does.

        A block or attention module with unknown parts (further norms, cross-attention) does
        not fit. Ignoring such a part would give wrong numbers without an error.
        """
        for path in (cls.layers_path, cls.final_norm_path, cls.unembedding_path):
            if resolve(module, path, default=None) is None:
                return f"it has no {path}"
        for index, block in enumerate(resolve(module, cls.layers_path)):
            attention = getattr(block, cls.attention_name, None)
            if attention is None:
                return f"layer {index} has no {cls.attention_name}"
            for owner, place, expected in (
                (block, "block", cls.block_names()),
                (attention, cls.attention_name, cls.attention_names()),
            ):
                found = {
                    name
                    for name, child in owner.named_children()
                    if any(True for _ in child.parameters())
                }
                if found != expected:
                    return (
                        f"layer {index}'s {place} holds {sorted(found)} "
                        f"where {sorted(expected)} is expected"
                    )
        return None


def call(module: Any, x: Float[torch.Tensor, "*rest features"]) -> Float[torch.Tensor, "*rest out"]:
    """Call a module on vectors (..., features), flattened to one sequence.

    bitsandbytes int8 layers take at most three dims; mixtures of experts take exactly three.
    """
    out: torch.Tensor = module(x.flatten(0, -2).unsqueeze(0)).squeeze(0).unflatten(0, x.shape[:-1])
    return out


_MISSING = object()


def resolve(root: Any, path: str, default: Any = _MISSING) -> Any:
    """Return the submodule at a dotted path."""
    for name in path.split("."):
        if default is not _MISSING and not hasattr(root, name):
            return default
        root = getattr(root, name)
    return root
