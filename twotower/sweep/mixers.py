"""Mixers of positions in counterfactual rows: linear attention, state spaces, convolutions.

A mixer carries a state from token to token. If only the last position is changed, all rows of a
prompt continue from one state: the one after the tokens before it. So a row costs the mixer one
token. Other rows pass through the mixer as whole sequences, and so do those of mixers that cannot
continue from a state (`Architecture.mixer_cache`).

Shapes: G packs of S changed positions, n rows, C columns that rows pass to the mixer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int

from ..models import Architecture
from ..models.mixer_state import MixerState
from ..walk.views import LayerView, PassingView
from .layout import Layout

if TYPE_CHECKING:
    from ..models import Model

MIXER_TOKENS = 4096
"""Tokens that a mixer takes at a time."""

STATE_BYTES = 1 << 27
"""Bytes of the rows' states that a mixer changes at a time."""


@dataclass
class RowMixer:
    """The mixer of a layer, as rows need it; each pack holds one prompt.

    Attributes
    ----------
    architecture, block
        Adapter and block of the layer.
    residual, mask
        (G, C, d_model) clean residual stream entering the block, and (G, C) mask of its tokens.
    columns
        (G, S) number of each changed position among the columns; C at padding of a pack.
    state
        State after the tokens before the columns; None if the columns are whole sequences.
    """

    architecture: Architecture
    block: Any
    residual: Float[torch.Tensor, "G C d_model"]
    mask: Bool[torch.Tensor, "G C"]
    columns: Int[torch.Tensor, "G S"]
    state: MixerState | None

    @classmethod
    def of(cls, view: LayerView | PassingView, layout: Layout) -> RowMixer:
        """Return the mixer of a layer, with copies of the clean tensors that rows need."""
        device = view.residual.device
        owner = layout.owner.on(device)
        prompt, width = owner.amax(dim=1), view.residual.shape[1]
        architecture, block, mask = view.architecture, view.block, view.mask.on(device)
        start, state = 0, MixerState()
        if layout.n_changed == 1 and width > 1 and steps(architecture):
            x = architecture.mixer_input(block, view.residual[prompt, :-1])
            architecture.mix(block, x, mask[prompt, :-1], state)
            if state.tensors:  # else a server ran the mixer on a copy of the state
                start = width - 1
        columns = layout.source.on(device) % width - start
        columns = torch.where(owner < 0, width - start, columns)
        residual, mask = view.residual[prompt, start:], mask[prompt, start:]
        return cls(architecture, block, residual, mask, columns, state if start else None)

    def mix(
        self, rows: Float[torch.Tensor, "G n S d_model"]
    ) -> Float[torch.Tensor, "G n S d_model"]:
        """Return what the mixer adds to the rows, at their changed positions."""
        architecture, block = self.architecture, self.block
        n_packs, width = self.mask.shape
        packs = torch.arange(n_packs, device=rows.device)[:, None]
        state = 0 if self.state is None else sum(x.nbytes for x in self.state.tensors)
        found = []
        for some in rows.split(rows_at_once(n_packs * width, state), dim=1):
            n = some.shape[1]
            whole = self.residual.new_empty(n_packs, width + 1, n, self.residual.shape[-1])
            whole[:, :width] = self.residual[:, :, None]
            whole[packs, self.columns] = some.transpose(1, 2)  # padding goes into the last column
            sequences = whole[:, :width].transpose(1, 2).flatten(0, 1)
            mask = self.mask.repeat_interleave(n, dim=0)
            states = None if self.state is None else self.state.repeated(n)
            x = architecture.mixer_input(block, sequences)
            output = architecture.mix(block, x, mask, states)
            output = output.unflatten(0, (n_packs, n)).transpose(1, 2)
            found.append(output[packs, self.columns.clamp(max=width - 1)].transpose(1, 2))
        return architecture.mixer_write(block, torch.cat(found, dim=1))


def rows_at_once(tokens: int, state: int) -> int:
    """Return how many rows of so many tokens and bytes of states a mixer takes at a time."""
    return max(1, min(MIXER_TOKENS // tokens, STATE_BYTES // state if state else MIXER_TOKENS))


def steps(architecture: Architecture) -> bool:
    """Check whether mixers continue from a state, in this version of transformers."""
    import transformers

    return architecture.mixer_cache is not None and hasattr(transformers.Cache, "get_conv_state")


def state_bytes(model: Model) -> int:
    """Return the bytes of a mixer's state for one sequence; 0 if it does not continue from one."""
    architecture = model.architecture
    if not steps(architecture):
        return 0
    return architecture.mixer_state() * max(
        4, model.dtype.itemsize
    )  # some are float32 in any model
