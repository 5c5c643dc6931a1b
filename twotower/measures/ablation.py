"""What a head's output is replaced by: nothing, its mean, or another prompt's.

All of it is settled before any batching: the mean is taken over all reference prompts, and
each prompt's donor is drawn once. So results do not depend on how prompts are batched.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Bool, Float, Int

from ..errors import InputError
from .batch import Batch, make_batch
from .batch_size import Batches
from .everywhere import Everywhere
from .missing import FINITE, tell, watch
from .walk import Donors, End, LayerView, Recorder, run_batch

if TYPE_CHECKING:
    from ..models import Model
    from ..prompts import Prompts

Key = tuple[str, int]
"""Role and number of demonstration: what positions of two prompts are matched by."""


@dataclass
class Values:
    """What heads' outputs are replaced by in a batch.

    Attributes
    ----------
    by_layer
        (..., H, d_head) of each layer, on its device; once the donors have been run.
    donors
        Prompts that are run first, if any.
    """

    by_layer: dict[int, Float[torch.Tensor, "*at H D"]]
    donors: list[Donors] = field(default_factory=list)


class Replacement:
    """Zero: heads' outputs are replaced by nothing."""

    def values(
        self, batch: Batch, layers: Sequence[int], index: Int[torch.Tensor, "*at"] | None = None
    ) -> Values | None:
        """What heads' outputs of some layers are replaced by; None stands for zero.

        At an index (...,) into the batch's flattened (B T) positions, which is on the host;
        at all, (B, T), by default. Positions that are not going to be replaced hold anything.
        """
        return None

    def kinds(self, batch: Batch) -> Int[np.ndarray, "B T"]:
        """(B, T) numbers, equal where a position is replaced by the same thing."""
        return np.zeros((len(batch.rows), batch.width), dtype=np.int64)


def make_replacement(
    model: Model,
    prompts: Prompts,
    at: Bool[np.ndarray, "prompt position"],
    ablation: str,
    reference: Prompts | None,
    seed: int,
) -> Replacement:
    """The replacement that an ablation asks for.

    Parameters
    ----------
    model, prompts
        What is measured.
    at
        (prompt, position) boolean: positions at which heads are going to be replaced.
    ablation
        "zero", "mean", "resample" or "patch".
    reference
        Prompts that means and donors are taken from; for "patch", each prompt's donor.
    seed
        Seed of the draw of donors.

    Raises
    ------
    InputError
        If a position cannot be matched to one in the reference prompts, or these were made
        with another tokenizer.
    """
    if reference is None:
        return Replacement()
    reference.check_model(model)
    if ablation == "mean":
        return _Mean(model, prompts, at, reference)
    if ablation == "resample":
        return _Donated(model, prompts, at, reference, _draw(prompts, reference, seed))
    check_donors(prompts, reference)
    return _Donated(model, prompts, at, reference, np.arange(len(prompts)))


def check_donors(prompts: Prompts, donors: Prompts) -> None:
    """Refuse another number of donors than of prompts."""
    if len(donors) != len(prompts):
        raise InputError(
            f"there are {len(donors)} donors for {len(prompts)} prompts; give one for each"
        )


def _draw(prompts: Prompts, reference: Prompts, seed: int) -> Int[np.ndarray, " prompt"]:
    """Each prompt's donor: one of the reference prompts that differs from it."""
    rng = np.random.default_rng([seed, 5])
    strings = np.array(reference.strings, dtype=object)
    donors = np.zeros(len(prompts), dtype=np.int64)
    for i, string in enumerate(prompts.strings):
        others = np.flatnonzero(strings != string)
        if not len(others):
            raise InputError("resample needs a reference prompt that differs from the prompt")
        donors[i] = int(rng.choice(others))
    return donors


def _keys(prompts: Prompts) -> list[list[Key]]:
    return [
        list(zip(roles, numbers, strict=True))
        for roles, numbers in zip(
            prompts.role.tolist(), prompts.demonstration.tolist(), strict=True
        )
    ]


class _Mean(Replacement):
    """Mean of z per layer, head, role and number of demonstration.

    Reference prompts whose logits are not finite are left out.
    """

    def __init__(
        self,
        model: Model,
        prompts: Prompts,
        at: Bool[np.ndarray, "prompt position"],
        reference: Prompts,
    ) -> None:
        reference_keys = _keys(reference)
        numbers: dict[Key, int] = {}
        for row in reference_keys:
            for key in row:
                numbers.setdefault(key, len(numbers))
        for row, wanted in zip(_keys(prompts), at, strict=True):
            for key, want in zip(row, wanted, strict=True):
                if want and key not in numbers:
                    raise InputError(
                        f"no reference prompt has a position of role {key[0]!r} in demonstration "
                        f"{key[1]}; take reference prompts with as many demonstrations"
                    )
        self.index = np.array([[numbers.get(k, 0) for k in row] for row in _keys(prompts)])
        own = np.array([[numbers[k] for k in row] for row in reference_keys])
        total = torch.zeros(len(numbers), model.n_layers, model.n_heads * model.d_head)
        finite = np.ones(len(reference), dtype=bool)
        feed = Batches(model, reference, kind="sums")

        def add(batch: Batch) -> None:
            recorders = [_Sums(batch.cut(own), len(numbers)), watch(batch, reference.label_ids, ())]
            sums, last = run_batch(model, batch, recorders)
            good = last[FINITE].numpy()
            finite[batch.rows] = good
            if good.all():
                total.add_(sums["sums"])
            elif good.any():  # a sum with NaN in it is lost: once more without them
                add(make_batch(model, reference, batch.rows[good]))

        for batch in feed:
            with feed.attempt():
                add(batch)
        tell("reference prompts", np.flatnonzero(~finite), len(reference))
        there = finite[:, None] & (reference.token_id >= 0)
        counts = np.bincount(own[there], minlength=len(numbers))
        if (counts[self.index[at]] == 0).any():
            raise InputError(
                "the reference prompts with finite logits lack a position that the mean is taken "
                "of: load the model with dtype='float32' or 'bfloat16', or take other prompts"
            )
        mean = total / torch.as_tensor(np.maximum(counts, 1))[:, None, None]
        by_layer = mean.unflatten(-1, (model.n_heads, -1)).unbind(dim=1)
        self.means = [x.to(device) for x, device in zip(by_layer, model.layer_devices, strict=True)]

    def values(
        self, batch: Batch, layers: Sequence[int], index: Int[torch.Tensor, "*at"] | None = None
    ) -> Values:
        keys = batch.cut(self.index)
        if index is not None:
            keys = keys.map(lambda x: x.flatten()[index])
        return Values({n: self.means[n][keys.on(self.means[n].device)] for n in layers})

    def kinds(self, batch: Batch) -> Int[np.ndarray, "B T"]:
        return batch.part(self.index)


class _Sums(Recorder):
    """Sum of z over positions with the same key; padding counts for nothing."""

    def __init__(self, index: Everywhere, n_keys: int) -> None:
        self.index, self.n_keys = index, n_keys
        self.sums: list[torch.Tensor] = []

    def layer(self, view: LayerView) -> None:
        z = view.z.flatten(-2).float() * view.real.unsqueeze(-1)
        empty = torch.zeros(self.n_keys, z.shape[-1], device=z.device)
        summed = empty.index_add(0, self.index.on(z.device).flatten(), z.flatten(0, 1))
        self.sums.append(summed)

    def finish(self, end: End) -> dict[str, torch.Tensor]:
        device = end.residual.device
        return {"sums": torch.stack([x.to(device) for x in self.sums], dim=1)}


class _Donated(Replacement):
    """The z of a donor prompt, position matched to position."""

    def __init__(
        self,
        model: Model,
        prompts: Prompts,
        at: Bool[np.ndarray, "prompt position"],
        reference: Prompts,
        donors: Int[np.ndarray, " prompt"],
    ) -> None:
        self.model, self.reference, self.donors = model, reference, donors
        self.columns = donor_columns(prompts, at, reference, donors)

    def values(
        self, batch: Batch, layers: Sequence[int], index: Int[torch.Tensor, "*at"] | None = None
    ) -> Values:
        donors = make_batch(self.model, self.reference, self.donors[batch.rows])
        columns = (torch.as_tensor(batch.part(self.columns)) + donors.width).clamp(min=0)
        columns = columns + torch.arange(len(columns))[:, None] * donors.width
        if index is not None:
            columns = columns.flatten()[index]
        recorder = _Heads(layers, Everywhere(columns, batch.devices))
        return Values(recorder.found, [Donors(donors, recorder)])

    def kinds(self, batch: Batch) -> Int[np.ndarray, "B T"]:
        return np.broadcast_to(np.arange(len(batch.rows))[:, None], (len(batch.rows), batch.width))


class _Heads(Recorder):
    """z (..., H, d_head) of some layers at an index (...,) into the batch's positions."""

    def __init__(self, layers: Sequence[int], index: Everywhere) -> None:
        self.layers, self.index = set(layers), index
        self.found: dict[int, torch.Tensor] = {}

    def layer(self, view: LayerView) -> None:
        if view.index in self.layers:
            self.found[view.index] = view.z.flatten(0, 1)[self.index.on(view.z.device)]


def donor_columns(
    prompts: Prompts,
    at: Bool[np.ndarray, "prompt position"],
    reference: Prompts,
    donors: Int[np.ndarray, " prompt"],
) -> Int[np.ndarray, "prompt position"]:
    """(prompt, position) column of the donor's matching position, counted from its end.

    Parameters
    ----------
    prompts
        What is measured.
    at
        (prompt, position) boolean: positions that need a match; others hold -1.
    reference, donors
        Prompts that donors are taken from, and (prompt,) which is whose.

    Raises
    ------
    InputError
        If a prompt and its donor do not align there.
    """
    reference_keys = _keys(reference)
    columns = np.full(at.shape, -1, dtype=np.int64)
    for i, (keys, donor) in enumerate(zip(_keys(prompts), donors, strict=True)):
        columns[i] = _match(keys, at[i], reference_keys[donor], i, int(donor))
    return columns


def _match(
    keys: list[Key],
    at: Bool[np.ndarray, " position"],
    donor_keys: list[Key],
    prompt: int,
    donor: int,
) -> Int[np.ndarray, " position"]:
    """Donor's column, counted from its end, for every wanted position of a prompt."""
    places: dict[Key, list[int]] = {}
    for column, key in enumerate(donor_keys):
        places.setdefault(key, []).append(column - len(donor_keys))
    own: dict[Key, list[int]] = {}
    for column, key in enumerate(keys):
        own.setdefault(key, []).append(column)
    columns = np.full(len(keys), -1, dtype=np.int64)
    for key, mine in own.items():
        if not at[mine].any():
            continue
        theirs = places.get(key, [])
        if len(theirs) != len(mine):
            raise InputError(
                f"prompt {prompt} has {len(mine)} tokens of role {key[0]!r} in demonstration "
                f"{key[1]} and its donor, reference prompt {donor}, has {len(theirs)}: they cannot "
                "be aligned. Use ablation='mean', or positions='last' or 'labels'"
            )
        columns[mine] = theirs
    return columns
