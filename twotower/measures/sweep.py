"""Sweeps: the effect of knocking out every head, from one walk of each batch."""

from __future__ import annotations

import torch

from .batch import Batch
from .readout import Readout
from .recorders import margin
from .rows import Clean, advance, new_rows
from .walk import End, LayerView, Recorder

TOKENS_PER_CHUNK = 4096
"""Tokens of counterfactual rows that are carried through the layers at a time."""


class Sweep(Recorder):
    """Effects of knocking out each head of a batch, one at a time.

    Parameters
    ----------
    batch
        The batch.
    readout
        Of the labels.
    at
        (B, T) boolean: positions at which z is replaced.
    replacement
        (layer, B, T, H d_head) what it is replaced by; None for zero.
    logprobs
        Whether to unembed to the whole vocabulary for log-probabilities.
    """

    group = "effects"

    def __init__(
        self,
        batch: Batch,
        readout: Readout,
        at: torch.Tensor,
        replacement: torch.Tensor | None,
        logprobs: bool,
    ) -> None:
        self.gold, self.readout = batch.gold, readout
        # Nothing before the first change can differ from the clean run.
        first = int(at.any(dim=0).int().argmax())
        self.n_row = batch.width - first
        self.at = at[:, first:]
        self.replacement = None if replacement is None else replacement[:, :, first:]
        self.logprobs = logprobs
        self.rows: torch.Tensor | None = None
        self.layers: list[Clean] = []

    def layer(self, view: LayerView) -> None:
        clean = Clean.of(view, self.n_row)
        if self.n_row == 1:
            # All heads' rows together, while the layer is at hand.
            joining = self._join(clean, list(range(view.z.shape[2])))
            if self.rows is not None:
                rows = advance(clean, self.rows.to(joining.device))
                joining = torch.cat((rows, joining), dim=1)
            self.rows = joining
        else:
            self.layers.append(clean)

    def _join(self, clean: Clean, heads: list[int], only_last: bool = False) -> torch.Tensor:
        device = clean.z.device
        at, replacement = self.at.to(device), None
        if self.replacement is not None:
            replacement = self.replacement[clean.view.index].to(device)
            replacement = replacement.unflatten(-1, clean.z.shape[-2:])
        if only_last and self.n_row > 1:
            clean = Clean.of(clean.view, 1)
            at = at[:, -1:]
            replacement = None if replacement is None else replacement[:, -1:]
        return new_rows(clean, heads, at, replacement)

    def _chunk(self, heads: list[tuple[int, int]]) -> torch.Tensor:
        """(B, n, 1, d_model) what leaves the model for each of n heads changed."""
        rows: torch.Tensor | None = None
        top = len(self.layers) - 1
        for clean in self.layers[heads[0][0] :]:
            index = clean.view.index
            joining = [head for layer, head in heads if layer == index]
            parts = []
            if rows is not None:
                parts.append(advance(clean, rows.to(clean.z.device), only_last=index == top))
            if joining:
                parts.append(self._join(clean, joining, only_last=index == top))
            rows = torch.cat(parts, dim=1)
        assert rows is not None
        return rows

    def finish(self, end: End) -> dict[str, torch.Tensor]:
        device = end.residual.device
        n_layers, n_heads = self.readout.directions.shape[:2]
        if self.rows is not None:
            rows = self.rows[:, :, 0].to(device)
        else:
            heads = [(layer, head) for layer in range(n_layers) for head in range(n_heads)]
            size = max(1, TOKENS_PER_CHUNK // (len(self.gold) * self.n_row))
            chunks = [heads[i : i + size] for i in range(0, len(heads), size)]
            rows = torch.cat([self._chunk(chunk)[:, :, 0].to(device) for chunk in chunks], dim=1)
        normed = end.final_norm(rows)
        clean = end.final_norm(end.residual[:, -1])
        gold = self.gold.to(device)
        logits, clean_logits = (self.readout.label_logits(x) for x in (normed, clean))
        drop = margin(clean_logits, gold)[:, None] - margin(logits, gold)
        found = {"margin_drop": drop.unflatten(1, (n_layers, n_heads))}
        if self.logprobs:
            dtype = end.residual.dtype
            before = self.readout.logprobs(clean, end, dtype)[:, None]
            after = self.readout.logprobs(normed, end, dtype)
            found["logprob_drop"] = (before - after).unflatten(1, (n_layers, n_heads))
        return found
