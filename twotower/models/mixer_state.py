"""State of a mixer: what a linear attention, state space or convolution keeps of earlier tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Shaped
from torch.nn import functional


@dataclass
class MixerState:
    """State of one layer's mixer after some tokens of n sequences.

    It has the methods through which transformers' mixers read and write their cache. An update
    replaces the tensors; transformers' own cache would copy into reserved memory.

    Attributes
    ----------
    conv
        (n, channels, kernel) last inputs of the mixer's convolution; None before the first token.
    recurrent
        (n, ...) what the mixer carries from token to token; None for convolutions only.
    """

    conv: Shaped[torch.Tensor, "n channels kernel"] | None = None
    recurrent: Shaped[torch.Tensor, " n *features"] | None = None

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> torch.Tensor | None:
        """Return the last inputs of the convolution."""
        return self.conv

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> torch.Tensor | None:
        """Return what is carried from token to token."""
        return self.recurrent

    def is_recording_past(self, layer_idx: int) -> bool:
        """Check whether earlier states are kept too: never."""
        return False

    def update_conv_state(
        self,
        conv_states: Shaped[torch.Tensor, "n channels T"],
        layer_idx: int,
        state_idx: int = 0,
        conv_kernel_size: int | None = None,
        **options: Any,
    ) -> Shaped[torch.Tensor, "n channels all"]:
        """Return earlier and new inputs of the convolution, and keep the last of them."""
        kernel = conv_kernel_size or conv_states.shape[-1]
        if self.conv is None:
            whole = functional.pad(conv_states, (max(0, kernel - conv_states.shape[-1]), 0))
        else:
            whole = torch.cat((self.conv, conv_states), dim=-1)
        self.conv = whole[..., -kernel:].clone()  # a slice would keep all inputs in memory
        return whole

    def update_recurrent_state(
        self, recurrent_states: torch.Tensor, layer_idx: int, state_idx: int = 0, **options: Any
    ) -> torch.Tensor:
        """Keep what is carried from token to token."""
        self.recurrent = recurrent_states
        return recurrent_states

    @property
    def tensors(self) -> list[torch.Tensor]:
        """The tensors of the state."""
        return [x for x in (self.conv, self.recurrent) if x is not None]

    def repeated(self, n_rows: int) -> MixerState:
        """Return a copy for rows, (n rows, ...); mixers change it in place."""
        conv, recurrent = (
            None if x is None else x.repeat_interleave(n_rows, dim=0)
            for x in (self.conv, self.recurrent)
        )
        return MixerState(conv, recurrent)
