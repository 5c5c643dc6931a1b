"""The tensors of a layer, and of the end of the model, as recorders and edits get them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Float32, Int

from ..models.positions import Positions, visible
from .everywhere import Everywhere
from .last import LastAttention
from .once import once

if TYPE_CHECKING:
    from ..models import Architecture


@dataclass
class LayerView:
    """Tensors of a layer, for a batch of B prompts of T positions.

    Attributes
    ----------
    index
        Number of the layer.
    block
        nnsight's envoy of the block; its modules can be called.
    mask
        (B, T) boolean: True for tokens, False for padding.
    residual
        (B, T, d_model) residual stream entering the block.
    query, key, value
        (B, T, H, d_key) queries, (B, T, K, d_key) keys, (B, T, K, d_head) values; before rotary.
    positions
        Tensors by which the scores depend on positions, such as rotary tables.
    z
        (B, T, H, d_head) heads' outputs before the output projection, after gates and edits.
    own_z
        (B, T, H, d_head) heads' outputs before edits, as computed by the model.
    gate
        (B, T, H, d_head or 1) factor on the heads' outputs, included in z; None without.
    sinks
        (H,) score of the heads' sinks; None without.
    attention_output
        (B, T, d_model) output of the output projection.
    attention_write, mlp_write
        (B, T, d_model) what attention and MLP add to the residual stream; the latter is 0 without
        an MLP.
    mixer_write
        (B, T, d_model) what a mixer of positions without heads adds; None without.
    more_input, more_write
        (B, T, ...) what the end of the block reads besides the stream, and (B, T, d_model) what
        it adds after the MLP; None without.
    factor
        Factor on the residual stream that leaves the block; None without.
    learned
        (B or 1, T, d_model) learned position embedding, or None.
    entered
        (B, T, d_model) residual stream before edits of the stream; None without.
    masks
        Masks of visible and hidden keys by device, number of queries, window and chunk; all
        layers share them.
    """

    architecture: Architecture
    index: int
    block: Any
    mask: Everywhere
    residual: Float[torch.Tensor, "B T d_model"]
    query: Float[torch.Tensor, "B T H d_key"]
    key: Float[torch.Tensor, "B T K d_key"]
    value: Float[torch.Tensor, "B T K D"]
    positions: Positions
    z: Float[torch.Tensor, "B T H D"]
    own_z: Float[torch.Tensor, "B T H D"]
    gate: Float[torch.Tensor, "B T H gated"] | None = None
    sinks: Float[torch.Tensor, " H"] | None = None
    attention_output: Float[torch.Tensor, "B T d_model"] | None = None
    attention_write: Float[torch.Tensor, "B T d_model"] | None = None
    mlp_write: Float[torch.Tensor, "B T d_model"] | None = None
    mixer_write: Float[torch.Tensor, "B T d_model"] | None = None
    more_input: Float[torch.Tensor, "B T *features"] | None = None
    more_write: Float[torch.Tensor, "B T d_model"] | None = None
    factor: Float[torch.Tensor, ""] | None = None
    learned: Everywhere | None = None
    entered: Float[torch.Tensor, "B T d_model"] | None = None
    masks: dict[Any, torch.Tensor] = field(default_factory=dict)

    def turn(
        self, x: Float[torch.Tensor, "B S heads d_key"], positions: slice, *, query: bool
    ) -> Float[torch.Tensor, "B S heads d_key"]:
        """Return queries or keys at S positions as they are multiplied, with rotary embedding."""
        at = self.positions.tables(lambda table: table[:, positions])
        return self.architecture.turn(self.block, x, at, query=query)

    @once
    def last(self) -> LastAttention:
        """Attention of the last position."""
        return LastAttention(
            self.architecture,
            self.index,
            self.block,
            self.query[:, -1],
            self.key,
            self.value,
            self.positions,
            self.hidden(),
            None if self.gate is None else self.gate[:, -1],
            self.sinks,
        )

    def until(self, column: int) -> LastAttention:
        """Return the attention of an earlier position, as the last one of a shorter sequence."""
        n = column + 1
        found = LastAttention(
            self.architecture,
            self.index,
            self.block,
            self.query[:, column],
            self.key[:, :n],
            self.value[:, :n],
            self.positions.first(n),
            ~visible(self.real[:, :n], 1, *self.reach),
            None if self.gate is None else self.gate[:, column],
            self.sinks,
        )
        found.__dict__["_turned_key"] = self.turned_key[:, :n]
        return found

    @property
    def turned_key(self) -> Float[torch.Tensor, "B T K d_key"]:
        """(B, T, K, d_key) keys after rotary."""
        return self.last.turned_key

    def visible(self, n_queries: int = 1) -> Bool[torch.Tensor, "B {n_queries} T"]:
        """Return (B, n_queries, T) boolean: keys visible to the last n_queries positions."""
        key = (self.z.device, n_queries, self.reach)
        if key not in self.masks:
            self.masks[key] = visible(self.real, n_queries, *self.reach)
        return self.masks[key]

    def hidden(self, n_queries: int = 1) -> Bool[torch.Tensor, "B {n_queries} T"]:
        """Return (B, n_queries, T) boolean: keys hidden from the last n_queries positions."""
        key = (self.z.device, n_queries, self.reach, "hidden")
        if key not in self.masks:
            self.masks[key] = ~self.visible(n_queries)
        return self.masks[key]

    @property
    def reach(self) -> tuple[int | None, int | None]:
        """Window and chunk of the layer; None without."""
        return self.architecture.window(self.index), self.architecture.chunk(self.index)

    @property
    def real(self) -> Bool[torch.Tensor, "B T"]:
        """(B, T) boolean: True for tokens, False for padding."""
        return self.mask.on(self.z.device)

    @once
    def content(
        self,
    ) -> tuple[Float[torch.Tensor, "B T H D"], Float[torch.Tensor, "B T K D"]]:
        """(B, T, H, D), (B, T, K, D) queries and keys without the learned position embedding.

        The position embedding's part of the attention norm's output is subtracted. To compute
        this part without reading weights, the norm is called on the embedding. The result minus
        the norm's bias is the weighted, centred embedding over the embedding's own standard
        deviation, which is then rescaled to that of the residual stream.
        """
        assert self.learned is not None
        architecture, norm = self.architecture, self.architecture.attention_norm(self.block)
        assert norm is not None
        embedding = self.learned.on(self.residual.device).to(self.residual.dtype)
        direct = (norm(embedding) - norm(torch.zeros_like(embedding[:, :1]))).float()
        deviation = [
            (
                x.float().var(dim=-1, keepdim=True, unbiased=False) + architecture.epsilon(norm)
            ).sqrt()
            for x in (embedding, self.residual)
        ]
        content = norm(self.residual).float() - direct * deviation[0] / deviation[1]
        content = content.to(self.residual.dtype)
        projected = [module(content) for module in architecture.qkv(self.block)]
        query, key, _ = architecture.split(self.block, projected)
        return query, key


@dataclass
class PassingView:
    """Tensors of a layer without heads.

    Attributes
    ----------
    index, block, mask, residual, entered
        As of `LayerView`.
    mixer_write, mlp_write
        (B, T, d_model) what mixer and MLP add to the residual stream; 0 without.
    """

    architecture: Architecture
    index: int
    block: Any
    mask: Everywhere
    residual: Float[torch.Tensor, "B T d_model"]
    mixer_write: Float[torch.Tensor, "B T d_model"]
    mlp_write: Float[torch.Tensor, "B T d_model"]
    entered: Float[torch.Tensor, "B T d_model"] | None = None


@dataclass
class End:
    """Tensors and modules after the last layer.

    Attributes
    ----------
    residual
        (B, d_model) residual stream of the last position, entering the final norm.
    logits
        (B, vocabulary) float32 logits of the last position, as computed by the model.
    final_norm, unembedding
        Envoys that can be called.
    logits_of
        Makes logits of the unembedding's output (multiplier, softcap).
    heads_in
        (layer,) number of heads of each layer.
    dtype
        Input dtype of the unembedding.
    stream
        (B, T, d_model) residual stream of all positions.
    last_logits
        (B, R, vocabulary) logits of the last positions, as computed by the model.
    left
        (B, d_model) residual stream that leaves the last layer, before edits of it; None without.
    """

    residual: Float[torch.Tensor, "B d_model"]
    logits: Float32[torch.Tensor, "B vocabulary"]
    final_norm: Any
    unembedding: Any
    dtype: torch.dtype
    logits_of: Callable[[torch.Tensor], torch.Tensor] = lambda unembedded: unembedded
    heads_in: Sequence[int] = ()
    stream: Float[torch.Tensor, "B T d_model"] | None = None
    last_logits: Float[torch.Tensor, "B R vocabulary"] | None = None
    left: Float[torch.Tensor, "B d_model"] | None = None

    def read(self, columns: Int[torch.Tensor, "B R"]) -> Float[torch.Tensor, "B R d_model"]:
        """Return the residual stream (B, R, d_model) of some positions."""
        if columns.shape[1] == 1:
            return self.residual[:, None]
        assert self.stream is not None
        index = columns.to(self.stream.device).unsqueeze(-1).expand(-1, -1, self.stream.shape[-1])
        return self.stream.gather(1, index).to(self.residual.device)
