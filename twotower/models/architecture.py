"""Base class of architecture adapters.

An adapter names the submodules of a model and describes how a block computes. It calls modules
and never computes with their weights. The same code therefore reads plain, quantized, offloaded
and remote models. Every method takes nnsight envoys or plain modules.

Shapes use B prompts, T positions, H query heads, K key-value heads, D = d_head.
"""

from __future__ import annotations

import abc
import re
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Bool, Float

from ..errors import ModelError
from .mixer_state import MixerState
from .positions import Positions, softcapped


class Architecture(abc.ABC):
    """Layout of one family of transformers.

    A block is ``x + write(project(z))``, then ``+ mlp_write(feed_forward(mlp_input(...)))``. z are
    the heads' outputs. `write` may contain a norm and a multiplier.

    Parameters
    ----------
    config
        The transformers configuration of the language model.
    """

    model_types: ClassVar[tuple[str, ...]]
    """`config.model_type` values with this layout."""

    layers_path: str
    """Path of the list of blocks, from the root module."""

    final_norm_path: str
    """Path of the norm before the unembedding, from the root module."""

    unembedding_path: str = "lm_head"
    """Path of the unembedding, from the root module."""

    learned_positions_path: str | None = None
    """Path of the learned position embedding, from the root module; None without one."""

    attention_norm_name: str | None
    mlp_norm_name: str | None
    """Norms before attention and MLP; None if they read the residual stream itself."""

    attention_post_norm_name: str | None = None
    mlp_post_norm_name: str | None = None
    """Norms between the output of attention or MLP and the residual stream; None without."""

    attention_name: str
    mlp_name: str = "mlp"
    """Names of a block's parts; dots lead to a part of a part."""

    qkv_names: tuple[str, ...]
    """Modules of the attention that read its input: projections to queries, keys and values, and
    to gates; in the order they run."""

    projection_name: str
    """The attention module's output projection; its input is z, the heads' outputs."""

    mixer_name: str | None = None
    """Module that mixes positions without heads (linear attention, state space, convolution) in
    the layers for which `mixes` is true; None without."""

    mixer_cache: str | None = None
    """Argument of the mixer for a cache, from which it continues by one token exactly as in a whole
    sequence. None if it cannot; it then runs on whole sequences."""

    more_names: ClassVar[frozenset[str]] = frozenset()
    """Further modules and parameters of blocks and attention that the adapter knows, such as norms
    of queries and keys. A layer may lack them."""

    interleaved_rotary: bool = False
    """Whether rotary embedding pairs neighbouring elements (GPT-J) or the two halves (Llama)."""

    tables: Literal["by element", "halves", "once"] = "by element"
    """Order of the angles in the model's rotary tables: one for each element as they are paired;
    all of them twice in a row although neighbours are paired; or each angle once."""

    rotary: bool = True
    """Whether queries and keys have a rotary embedding in at least one layer."""

    score_softcap: float | None = None
    """Scores s become c tanh(s / c) for this c; None to leave them."""

    logit_multiplier: float = 1.0
    """Factor on the unembedding's output."""

    logit_softcap: float | None = None
    """Logits l become c tanh(l / c) for this c; None to leave them."""

    residual_multiplier: float = 1.0
    """Factor on what attention and MLP add to the residual stream."""

    def __init__(self, config: Any) -> None:
        self.config = config
        self.n_layers: int = config.num_hidden_layers
        self.n_heads: int = config.num_attention_heads
        self.n_kv_heads: int = getattr(config, "num_key_value_heads", None) or self.n_heads
        self.d_model: int = config.hidden_size
        self.d_head: int = getattr(config, "head_dim", None) or self.d_model // self.n_heads
        self.d_key: int = self.d_head
        self.d_mlp: int = (
            getattr(config, "intermediate_size", None)
            or getattr(config, "n_inner", None)
            or 4 * self.d_model
        )
        self.vocabulary_size: int = config.vocab_size

    @property
    def max_positions(self) -> int | None:
        """Largest number of tokens of a prompt, as the configuration says now; None for any."""
        found: int | None = getattr(self.config, "max_position_embeddings", None)
        return found

    # ---- places -----------------------------------------------------------------

    def layers(self, root: Any) -> Any:
        """Return the list of blocks."""
        return resolve(root, self.layers_path)

    def final_norm(self, root: Any) -> Any:
        """Return the norm before the unembedding."""
        return resolve(root, self.final_norm_path)

    def end(self, root: Any) -> Float[torch.Tensor, "B T d_model"]:
        """Return the residual stream entering the final norm; only in a trace."""
        stream: torch.Tensor = self.final_norm(root).input
        return stream

    def replace_end(self, root: Any, stream: Float[torch.Tensor, "B T d_model"]) -> None:
        """Replace the residual stream entering the final norm; only in a trace, after `end`."""
        self.final_norm(root).input = stream

    def normed(self, root: Any) -> Float[torch.Tensor, "B n d_model"]:
        """Return the output of the final norm; only in a trace, after `end`."""
        output: torch.Tensor = self.final_norm(root).output
        return output

    def unembedding(self, root: Any) -> Any:
        """Return the unembedding: the map from the normed residual stream to logits."""
        return resolve(root, self.unembedding_path)

    def learned_positions(self, root: Any) -> Float[torch.Tensor, "#B T d_model"] | None:
        """Return the position embedding that is added to the tokens'; only inside a trace.

        It may be fixed instead of learned. None without, as for rotary positions.
        """
        path = self.learned_positions_path
        return None if path is None else resolve(root, path).output

    def attention(self, block: Any) -> Any:
        """Return the attention module of a block."""
        return resolve(block, self.attention_name)

    def attention_norm(self, block: Any) -> Any | None:
        """Return the norm before attention; None without one."""
        return part(block, self.attention_norm_name)

    def attention_post_norm(self, block: Any) -> Any | None:
        """Return the norm between attention and the residual stream; None without one."""
        return part(block, self.attention_post_norm_name)

    def mlp_norm(self, block: Any) -> Any | None:
        """Return the norm before the MLP; in GPT-J attention shares it. None without one."""
        return part(block, self.mlp_norm_name)

    def mlp_post_norm(self, block: Any) -> Any | None:
        """Return the norm between the MLP and the residual stream; None without one."""
        return part(block, self.mlp_post_norm_name)

    def mlp(self, block: Any) -> Any:
        """Return the MLP of a block."""
        return resolve(block, self.mlp_name)

    def mixer(self, block: Any) -> Any:
        """Return the module that mixes positions without heads."""
        assert self.mixer_name is not None
        return resolve(block, self.mixer_name)

    def projection(self, block: Any) -> Any:
        """Return the output projection; its input concatenates the heads' outputs."""
        return getattr(self.attention(block), self.projection_name)

    def qkv(self, block: Any) -> list[Any]:
        """Return the modules that read attention's input: projections to q, k, v and gates."""
        attention = self.attention(block)
        return [getattr(attention, name) for name in self.qkv_names]

    # ---- how a block computes -----------------------------------------------------

    def has_heads(self, layer: int) -> bool:
        """Check whether a layer has heads that attend by softmax.

        With a mixer, these are the layers of the type "full_attention" in the configuration.
        """
        return self.mixer_name is None or self.config.layer_types[layer] == "full_attention"

    def mixes(self, layer: int) -> bool:
        """Check whether a layer mixes positions without heads, instead of or beside heads."""
        return not self.has_heads(layer)

    def has_mlp(self, layer: int) -> bool:
        """Check whether a layer has an MLP."""
        return True

    def heads_in(self, layer: int) -> int:
        """Return the number of query heads of a layer."""
        return self.n_heads if self.has_heads(layer) else 0

    def write_multiplier(self, layer: int) -> float:
        """Return the factor on what a layer's attention adds to the residual stream."""
        return self.residual_multiplier

    @property
    def parallel(self) -> bool:
        """Whether attention and MLP both read the block's input (parallel block)."""
        return False

    def attention_input(
        self, block: Any, x: Float[torch.Tensor, "*rest d_model"]
    ) -> Float[torch.Tensor, "*rest d_model"]:
        """Return what attention reads, from the residual stream."""
        norm = self.attention_norm(block)
        return x if norm is None else norm(x)

    def mlp_input(
        self, block: Any, x: Float[torch.Tensor, "*rest d_model"]
    ) -> Float[torch.Tensor, "*rest d_model"]:
        """Return what the MLP reads, from the residual stream."""
        norm = self.mlp_norm(block)
        return x if norm is None else norm(x)

    def feed_forward(
        self, block: Any, x: Float[torch.Tensor, "*rest d_model"]
    ) -> Float[torch.Tensor, "*rest d_model"]:
        """Return the MLP's output for its (normed) input."""
        return call(self.mlp(block), x)

    def mixer_input(
        self, block: Any, x: Float[torch.Tensor, "*rest d_model"]
    ) -> Float[torch.Tensor, "*rest d_model"]:
        """Return what the mixer reads, from the residual stream."""
        return self.attention_input(block, x)

    def mix(
        self,
        block: Any,
        x: Float[torch.Tensor, "n T d_model"],
        mask: Bool[torch.Tensor, "n T"],
        state: MixerState | None = None,
    ) -> Float[torch.Tensor, "n T d_model"]:
        """Return the mixer's output for its input.

        Parameters
        ----------
        block
            The block.
        x, mask
            Left-padded sequences, and True at their tokens.
        state
            State after earlier tokens, which is updated; empty if there are none. None to run on
            whole sequences.
        """
        cache = {} if state is None else {str(self.mixer_cache): state}
        mixed: torch.Tensor = first(
            self.mixer(block)(x, attention_mask=mask.to(torch.long), **cache)
        )
        return mixed

    def mixer_state(self) -> int:
        """Return the number of elements of a mixer's state for one sequence; 0 without one."""
        return 0

    def mixer_output(self, block: Any) -> Float[torch.Tensor, "B T d_model"]:
        """Return the mixer's output in the forward; only inside a trace."""
        output: torch.Tensor = first(self.mixer(block).output)
        return output

    def mixer_write(
        self, block: Any, output: Float[torch.Tensor, "*rest d_model"]
    ) -> Float[torch.Tensor, "*rest d_model"]:
        """Return what the mixer adds to the stream, from its output."""
        return self.write(block, output)

    def mixer_written(
        self, block: Any, output: Float[torch.Tensor, "B T d_model"]
    ) -> Float[torch.Tensor, "B T d_model"]:
        """Return what the mixer added in the forward; only inside a trace."""
        return self.written(block, output)

    def mlp_output(self, block: Any) -> Float[torch.Tensor, "B T d_model"]:
        """Return the MLP's output in the forward; only inside a trace."""
        output: torch.Tensor = first(self.mlp(block).output)
        return output

    def write(
        self, block: Any, output: Float[torch.Tensor, "*rest d_model"]
    ) -> Float[torch.Tensor, "*rest d_model"]:
        """Return what attention adds to the stream, from the output of its projection."""
        return self._added(self.attention_post_norm(block), output)

    def mlp_write(
        self, block: Any, output: Float[torch.Tensor, "*rest d_model"]
    ) -> Float[torch.Tensor, "*rest d_model"]:
        """Return what the MLP adds to the stream, from its output."""
        return self._added(self.mlp_post_norm(block), output)

    def written(
        self, block: Any, output: Float[torch.Tensor, "B T d_model"]
    ) -> Float[torch.Tensor, "B T d_model"]:
        """Return what attention added in the forward; only inside a trace."""
        norm = self.attention_post_norm(block)
        return self._times(output if norm is None else norm.output)

    def mlp_written(
        self, block: Any, output: Float[torch.Tensor, "B T d_model"]
    ) -> Float[torch.Tensor, "B T d_model"]:
        """Return what the MLP added in the forward; only inside a trace."""
        norm = self.mlp_post_norm(block)
        return self._times(output if norm is None else norm.output)

    def _added(self, norm: Any | None, output: torch.Tensor) -> torch.Tensor:
        return self._times(output if norm is None else norm(output))

    def _times(self, x: torch.Tensor) -> torch.Tensor:
        return x if self.residual_multiplier == 1 else x * self.residual_multiplier

    def logits(self, unembedded: Float[torch.Tensor, "*rest"]) -> Float[torch.Tensor, "*rest"]:
        """Return the model's logits, from the unembedding's output."""
        whole = unembedded if self.logit_multiplier == 1 else unembedded * self.logit_multiplier
        return softcapped(whole, self.logit_softcap)

    def writes_more(self, layer: int) -> bool:
        """Check whether a layer adds a value of each token to the stream after its MLP."""
        return False

    def more_input(self, block: Any) -> Float[torch.Tensor, "B T *rest"] | None:
        """Return what the end of a block reads for each token besides the stream; None without.

        Only inside a trace.
        """
        return None

    def more_written(self, block: Any) -> Float[torch.Tensor, "B T d_model"] | None:
        """Return what a block adds to the stream after the MLP; only inside a trace."""
        return None

    def leave(
        self, block: Any, x: Float[torch.Tensor, "*rest d_model"], more: torch.Tensor | None
    ) -> Float[torch.Tensor, "*rest d_model"]:
        """Return the residual stream that leaves a block, from the stream after the MLP.

        Parameters
        ----------
        block, x
            The block, and the stream.
        more
            (..., features) as from `more_input`.
        """
        return x

    def stream_factor(self, block: Any) -> Float[torch.Tensor, ""] | None:
        """Return the factor on the residual stream that leaves a block; None without."""
        return None

    # ---- how heads attend -----------------------------------------------------------

    @abc.abstractmethod
    def split(
        self, block: Any, projected: list[torch.Tensor]
    ) -> tuple[
        Float[torch.Tensor, "*rest H d_key"],
        Float[torch.Tensor, "*rest K d_key"],
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
            Queries (..., H, d_key), keys (..., K, d_key) and values (..., K, D), before rotary.
        """

    def keys_of(self, layer: int) -> int:
        """Return the layer whose keys and values a layer uses: its own, or an earlier one's.

        `split` then returns only queries, and None twice.
        """
        return layer

    @property
    def plain_scores(self) -> bool:
        """Whether torch's kernels can compute the attention: without softcap, sinks and biases."""
        own = type(self)
        biased = own.key_bias is not Architecture.key_bias
        return self.score_softcap is None and own.sinks is Architecture.sinks and not biased

    @property
    def shared_keys(self) -> set[int]:
        """Layers whose keys and values later layers use."""
        layers = filter(self.has_heads, range(self.n_layers))
        return {self.keys_of(layer) for layer in layers if self.keys_of(layer) != layer}

    def gate(
        self, block: Any, projected: list[torch.Tensor]
    ) -> Float[torch.Tensor, "*rest H gated"] | None:
        """Return factors (..., H, D or 1) on the heads' outputs, from the outputs of `qkv`.

        None without gates. The factors are included in z.
        """
        return None

    def rotates(self, layer: int) -> bool:
        """Check whether a layer's queries and keys are rotated."""
        return self.rotary

    def rotary_tables(
        self, attention: Any
    ) -> tuple[Float[torch.Tensor, "B T rotated"], Float[torch.Tensor, "B T rotated"]]:
        """Return cosines and sines (B or 1, T, rotated elements) of a block that rotates.

        They are read from the attention module's inputs inside a trace. Scaled and per-layer
        rotary embeddings therefore come from the model itself.
        """
        cos, sin = attention.inputs[1]["position_embeddings"]
        return cos, sin

    def query_factor(self, attention: Any, layer: int) -> Float[torch.Tensor, "#B T"] | None:
        """Return factors (B or 1, T) on the queries of a layer, by position; None without.

        Only inside a trace.
        """
        return None

    def key_bias(self, attention: Any, layer: int) -> Float[torch.Tensor, "#B H T"] | None:
        """Return what is added to a layer's scores for each key (B or 1, H, T), as by ALiBi.

        Only inside a trace. None without.
        """
        return None

    def sinks(self, attention: Any) -> Float[torch.Tensor, " H"] | None:
        """Return the score of the heads' sinks: a column of the softmax without a key."""
        return None

    def positions(self, attention: Any, layer: int) -> Positions:
        """Return how a layer's scores depend on positions; only inside a trace."""
        tables = self.rotary_tables(attention) if self.rotates(layer) else (None, None)
        cos, sin = (None if t is None else self._by_element(t).unsqueeze(-2) for t in tables)
        factor = self.query_factor(attention, layer)
        return Positions(
            cos,
            sin,
            None if factor is None else factor[..., None, None],
            self.key_bias(attention, layer),
        )

    def _by_element(self, table: torch.Tensor) -> torch.Tensor:
        if self.tables == "by element":
            return table
        once = table if self.tables == "once" else table[..., : table.shape[-1] // 2]
        if self.interleaved_rotary:
            return once.repeat_interleave(2, dim=-1)
        return torch.cat((once, once), dim=-1)

    def turn(
        self,
        block: Any,
        x: Float[torch.Tensor, "*rest heads d_key"],
        at: Positions,
        *,
        query: bool,
    ) -> Float[torch.Tensor, "*rest heads d_key"]:
        """Return queries or keys as they are multiplied, from those of `split`."""
        if at.cos is not None and at.sin is not None:
            x = self.rotate(x, at.cos.to(x.dtype), at.sin.to(x.dtype))
        x = self.after_rotary(block, x, query=query)
        return x if not query or at.factor is None else (x * at.factor).to(x.dtype)

    def after_rotary(
        self, block: Any, x: Float[torch.Tensor, "*rest heads d_key"], *, query: bool
    ) -> Float[torch.Tensor, "*rest heads d_key"]:
        """Return rotated queries or keys after a norm that follows the rotary embedding."""
        return x

    def rotate(
        self,
        x: Float[torch.Tensor, "*rest heads d_key"],
        cos: Float[torch.Tensor, "*#rest 1 rotated"],
        sin: Float[torch.Tensor, "*#rest 1 rotated"],
    ) -> Float[torch.Tensor, "*rest heads d_key"]:
        """Apply rotary embedding to x (..., heads, d_key), with tables (..., 1, rotated)."""
        rotated = cos.shape[-1]
        head, rest = x[..., :rotated], x[..., rotated:]
        if self.interleaved_rotary:
            first, second = slice(None, None, 2), slice(1, None, 2)
        else:
            first, second = slice(rotated // 2), slice(rotated // 2, None)
        # In place: whole copies of the keys of all positions take longer than the arithmetic.
        out = head * cos
        out[..., first].addcmul_(head[..., second], sin[..., first], value=-1)
        out[..., second].addcmul_(head[..., first], sin[..., second])
        return torch.cat((out, rest), dim=-1) if rest.shape[-1] else out

    def scaling(self, layer: int) -> float:
        """Return the factor on q.k before the softmax."""
        return float(self.d_head**-0.5)

    def window(self, layer: int) -> int | None:
        """Return how many positions a query attends to, its own included; None for all."""
        window: int | None = getattr(self.config, "sliding_window", None)
        kinds = getattr(self.config, "layer_types", None)
        return window if kinds is None or kinds[layer] == "sliding_attention" else None

    def chunk(self, layer: int) -> int | None:
        """Return the size of the chunks of positions within which queries attend; None for all."""
        kinds = getattr(self.config, "layer_types", None)
        chunked = kinds is not None and kinds[layer] == "chunked_attention"
        return self.config.attention_chunk_size if chunked else None

    # ---- files and norms --------------------------------------------------------------

    def of_a_layer(self, name: str) -> bool:
        """Check that a checkpoint weight belongs to a layer and is not a buffer of old files."""
        layers = self.layers_path.rpartition(".")[2]
        buffers = ("rotary_emb.inv_freq", "attn.bias", "masked_bias", "attention.bias")
        return bool(re.search(rf"(^|\.){layers}\.\d+\.", name)) and not name.endswith(buffers)

    def epsilon(self, norm: Any) -> float:
        """Return the constant under the square root of a norm's statistic."""
        for name in ("variance_epsilon", "eps", "epsilon"):
            if isinstance(getattr(norm, name, None), float):
                return float(getattr(norm, name))
        return self.norm_epsilon

    @property
    def norm_epsilon(self) -> float:
        """Epsilon of the norms, from the configuration."""
        names = "rms_norm_eps layer_norm_epsilon layer_norm_eps norm_epsilon norm_eps".split()
        for name in names:
            if getattr(self.config, name, None) is not None:
                return float(getattr(self.config, name))
        raise ModelError(f"{type(self.config).__name__} has no epsilon for its norms")


def part(block: Any, name: str | None) -> Any | None:
    """Return the named part of a block; None for no name."""
    return None if name is None else resolve(block, name)


def first(output: Any) -> Any:
    """Return a module's output, the first one if there are several."""
    return output[0] if isinstance(output, tuple) else output


def call(module: Any, x: Float[torch.Tensor, "*rest features"]) -> Float[torch.Tensor, "*rest out"]:
    """Call a module on vectors (..., features), flattened to one sequence.

    bitsandbytes int8 layers take at most three dims; mixtures of experts take exactly three.
    """
    out: torch.Tensor = first(module(x.flatten(0, -2).unsqueeze(0)))
    shaped: torch.Tensor = out.flatten(0, -2).unflatten(0, x.shape[:-1])
    return shaped


_MISSING = object()


def resolve(root: Any, path: str, default: Any = _MISSING) -> Any:
    """Return the submodule at a dotted path."""
    for name in path.split("."):
        if default is not _MISSING and not hasattr(root, name):
            return default
        root = getattr(root, name)
    return root
