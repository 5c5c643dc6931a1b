"""Sweeps: effects of changing groups of heads, one group at a time, from one walk."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch.nn.functional import pad

from ..models.rounding import Rounding, coarsest
from ..walk.batch import Batch
from ..walk.proof import Claim
from ..walk.readout import Readout, token_logprobs
from ..walk.recorder import Recorder
from ..walk.tensors import margin
from ..walk.views import End, LayerView, PassingView
from .counterfactuals import Group, Plan, plan
from .layout import Layout
from .rows import Carried, Clean, Moves, Replaces, advance


class Sweep(Recorder):
    """Recorder of the effects of changing groups of heads, one group at a time.

    Parameters
    ----------
    batch
        The batch; `gold` is the label whose margin is read.
    readout
        Readout of the labels.
    layout
        Layout of the rows.
    change
        Change of the heads.
    chunks
        Groups of heads; the rows of a chunk pass through the layers together. A single chunk
        advances during the walk. With several chunks, the tensors needed from the clean run
        are kept until the walk ends.
    unembedded
        Number of vectors to unembed at a time to the whole vocabulary, for
        log-probabilities; 0 for no log-probabilities.
    shape
        Results are (B, *shape) and (B, *shape, label).
    places
        Index of each group's result in the flattened shape; NaN fills the rest. None if every
        place has a group.
    layer_devices
        Device of each layer.
    group
        Group of the schema that names the results.
    rounding
        Error that the model's arithmetic allows in the unchanged row; None for no unchanged row.
    tokens
        If not 0, return log-probabilities of all tokens of a completion (B, tokens) and their
        drops (B, *shape, tokens), instead of drops of their sums (B, *shape, label).
    """

    def __init__(
        self,
        batch: Batch,
        readout: Readout,
        layout: Layout,
        change: Replaces,
        chunks: Sequence[Sequence[Group]],
        unembedded: int,
        shape: tuple[int, ...],
        places: Sequence[int] | None,
        layer_devices: Sequence[torch.device],
        group: str,
        rounding: Rounding | None,
        tokens: int = 0,
    ) -> None:
        self.group, self.shape = group, shape
        self.shares_rows = layout.n_changed > 1
        self.gold, self.answers, self.layout, self.change = (
            batch.gold,
            batch.answers,
            layout,
            change,
        )
        self.readout = readout
        self.donors = change.change.donors
        self.unembedded, self.tokens = unembedded, tokens
        heads_in = readout.heads_in
        n_layers = len(heads_in)
        self.top = n_layers - 1
        self.places = None if places is None else batch.everywhere(np.array(places))
        self.rounding = rounding
        self.claims: list[Claim] = []
        plans = self.plan(chunks, n_layers)
        self.unchanged = [p.unchanged for p in plans]
        self.orders = [batch.everywhere(np.array(p.order)) for p in plans]
        self.moves = [
            [Moves.of(*x) for x in zip(p.steps, layer_devices, heads_in, strict=True)]
            for p in plans
        ]
        self.rows: torch.Tensor | None = None
        self.layers: list[Clean] = []
        self.carried: dict[int, Carried] = {}

    def plan(self, chunks: Sequence[Sequence[Group]], n_layers: int) -> list[Plan]:
        """Return the plan of each chunk's runs."""
        proved = self.rounding is not None
        return [
            plan(chunk, n_layers, self._start(chunk, number) if proved else None)
            for number, chunk in enumerate(chunks)
        ]

    def _start(self, chunk: Sequence[Group], number: int) -> int:
        """Return the layer at which a chunk's unchanged row starts.

        This is the first layer if rows have one position, and in the first chunk. In other
        chunks, a longer row through all layers would cost too much. There it passes only through
        the last layers, at about a hundredth of the chunk's cost.
        """
        if self.layout.n_changed == 1 or number == 0:
            return 0
        n_layers = self.top + 1
        return n_layers - max(1, plan(chunk, n_layers).row_layers // 100)

    def layer(self, view: LayerView) -> None:
        self._pass(view)

    def passing(self, view: PassingView) -> None:
        self._pass(view)

    def _pass(self, view: LayerView | PassingView) -> None:
        entered = any(moves[view.index].n_before for moves in self.moves)
        clean = Clean.of(view, self.layout, entered)
        if len(self.moves) == 1:
            self.rows = self._advance(clean, self.rows, 0)
        else:
            self.layers.append(clean)

    def _advance(
        self,
        clean: Clean,
        rows: Float[torch.Tensor, "G n_before S d_model"] | None,
        chunk: int,
    ) -> Float[torch.Tensor, "G n end d_model"] | None:
        if rows is not None:
            self._check_unchanged(clean, rows, chunk)
            rows = rows.to(clean.residual.device)
        only_last = clean.index == self.top
        moves = self.moves[chunk][clean.index]
        if clean.index == 0:
            self.carried = {}
        how = (moves, self.change, self.layout, self.carried)
        found = advance(clean, rows, *how, only_last)
        self.before = clean.size, clean.score
        z = () if clean.heads is None else (clean.heads.z,)
        self.dtype = coarsest(clean.residual, *z)
        return found

    def _check_unchanged(
        self, clean: Clean, rows: Float[torch.Tensor, "G n_before S d_model"], chunk: int
    ) -> None:
        """Claim that the unchanged row equals the clean run before a layer, then reset it.

        The reset checks each layer by itself, so that rounding errors do not accumulate.
        """
        index = self.unchanged[chunk][clean.index - 1]
        if index is None:
            return
        own = clean.residual.to(rows.device)  # rows are still on the previous layer's device
        self._claim(clean.index - 1, rows[:, index], own, self.layout.worst)
        rows[:, index] = own

    def _claim(
        self,
        layer: int,
        row: Float[torch.Tensor, "*places d_model"],
        clean: Float[torch.Tensor, "*places d_model"],
        by_prompt: Callable[[torch.Tensor], torch.Tensor],
    ) -> None:
        assert self.rounding is not None
        size, score = (x.to(row.device) for x in self.before)
        left = (row.float() - clean.float()).norm(dim=-1)
        if size.shape != left.shape:
            size = self.layout.by_prompt(self.layout.ends(size)[:, None])[:, 0]
        error = left / size.clamp(min=torch.finfo(size.dtype).tiny)
        error = by_prompt(error.nan_to_num(nan=torch.inf))
        self.claims.append(
            Claim("unchanged row", [layer], error[None], self.rounding.block(self.dtype, score))
        )

    def _chunk(self, chunk: int) -> Float[torch.Tensor, "G n Q d_model"]:
        """Return (G, n, Q, d_model) the residual streams of a chunk's runs after the last layer."""
        rows: torch.Tensor | None = None
        for clean in self.layers:
            rows = self._advance(clean, rows, chunk)
        assert rows is not None
        return rows

    def _scores(
        self, residual: Float[torch.Tensor, "B n R d_model"], end: End
    ) -> dict[str, Float[torch.Tensor, "B n *rest"]]:
        """Return the values whose drops are results, of residual streams at the read positions."""
        if self.answers.continued:
            return {"logprob": self._answers(residual, end)}
        residual = residual[:, :, 0]
        found = {}
        if self.unembedded:
            found["logprob"] = self.readout.logprobs(end.final_norm(residual), end, self.unembedded)
        if self.answers.alone:
            found["margin"] = found["logprob"][..., 0]
        else:  # norm and logits in float32
            normed = self.readout.frozen_norm(residual, self.readout.spread(residual))
            found["margin"] = margin(
                self.readout.label_logits(normed), self.gold.on(residual.device)
            )
        return found

    def _answers(
        self, residual: Float[torch.Tensor, "B n R d_model"], end: End
    ) -> Float[torch.Tensor, "B n label_or_R"]:
        """Return the log-probabilities of whole answers, or of each of their tokens."""
        there = self.answers.there.on(residual.device)[:, None]

        def tokens(device: torch.device) -> torch.Tensor:
            return self.answers.tokens.on(device)[:, None]

        found = token_logprobs(end.final_norm(residual), tokens, end, self.unembedded)
        if self.tokens:
            by_token = found.masked_fill(~there, torch.nan)[..., 0]
            return pad(by_token, (0, self.tokens - by_token.shape[-1]), value=torch.nan)
        total = found.masked_fill(~there, 0).sum(dim=2)
        return total.masked_fill(~there.any(dim=2), torch.nan)

    def finish(self, end: End) -> dict[str, torch.Tensor]:
        clean = end.read(self.answers.reads.on(end.residual.device))
        before = self._scores(clean[:, None], end)
        if "logprob" in before and not self.answers.continued:
            self.final_logprobs = before["logprob"][:, 0]
        drops: dict[str, list[torch.Tensor]] = {name: [] for name in before}
        for chunk, order in enumerate(self.orders):
            rows = self._chunk(chunk) if self.rows is None else self.rows
            rows = self.layout.by_prompt(rows)
            unchanged = self.unchanged[chunk][-1]
            if unchanged is not None:
                own = clean.to(rows.device)
                self._claim(self.top, rows[:, unchanged], own, lambda x: x.amax(dim=-1))
            rows = rows.to(clean.device)[:, order.on(clean.device)]
            for name, after in self._scores(rows, end).items():
                drops[name].append(before[name] - after)
        found = {name: torch.cat(parts, dim=1) for name, parts in drops.items()}
        # If a counterfactual overflows, all its results are missing.
        like = found["margin"] if "margin" in found else found["logprob"]
        missing = torch.zeros_like(like, dtype=torch.bool)
        for name, drop in found.items():
            lost = ~drop.isfinite() & before[name].isfinite()
            missing |= lost if lost.dim() == missing.dim() else lost.any(dim=-1)
        shaped = {}
        for name, drop in found.items():
            lost = missing if missing.dim() == drop.dim() else missing.unsqueeze(-1)
            shaped[f"{name}_drop"] = self._shaped(drop.masked_fill(lost, torch.nan))
        if self.tokens:
            shaped["logprob"] = before["logprob"][:, 0]
        return shaped

    def _shaped(self, x: Float[torch.Tensor, "B group *rest"]) -> Float[torch.Tensor, " B *shape"]:
        if self.places is not None:
            n = int(np.prod(self.shape))
            whole = x.new_full((len(x), n, *x.shape[2:]), torch.nan)
            x = whole.index_copy(1, self.places.on(x.device), x)
        shaped: torch.Tensor = x.unflatten(1, self.shape)
        return shaped
