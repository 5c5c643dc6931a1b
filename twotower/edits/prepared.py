"""Changes of heads' outputs, prepared for a model and prompts and then for each batch.

Means and donors are fixed before batching: the mean is taken over all reference prompts, and
each prompt's donor is drawn once. So results do not depend on the batch size.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int

from ..errors import InputError
from ..models.weights import hash_weights
from ..prompts.sequences import base_of
from ..walk.batch import Batch, make_batch
from ..walk.batch_size import Batches
from ..walk.everywhere import Everywhere
from ..walk.not_finite import FINITE, note_missing, watch
from ..walk.recorder import Donors, Recorder
from ..walk.views import End, LayerView, PassingView
from ..walk.walk import run_batch
from .alignment import Key, donor_columns, donors_of_sequences, position_keys
from .changes import Change, From, Mean, Resample, Times, Zero, check_change

if TYPE_CHECKING:
    from ..models import Model
    from ..prompts import Prompts


MEANS = ("means",)
"""Key of the last means in a model's cache."""

Part = int | tuple[str, int]
"""A layer, whose heads are changed, or the kind and layer of another part ("mlp", 3)."""


@dataclass
class BatchChange:
    """Change of the outputs of heads, or of other parts, in a batch.

    Attributes
    ----------
    factor
        Multiplies z if there are no replacements. A factor of 0 gives zeros, even if z is not
        finite.
    replacements
        (..., H, d_head) by layer, and (..., d_model) of other parts, on the layer's device; filled
        when the donors have run. None to multiply by the factor.
    donors
        Donors to run before the batch, if any.
    """

    factor: float = 0.0
    replacements: dict[Part, Float[torch.Tensor, "*at"]] | None = None
    donors: list[Donors] = field(default_factory=list)

    def output(self, part: Part, z: Float[torch.Tensor, "*at"]) -> Float[torch.Tensor, "*new"]:
        """Return the new output of a part, in a shape that broadcasts to its output z."""
        if self.replacements is not None:
            return self.replacements[part].to(z.device, z.dtype)
        return z * self.factor if self.factor else z.new_zeros(())


class PreparedChange:
    """A change that is checked against model and prompts, ready for batches."""

    def __init__(self, factor: float = 0.0) -> None:
        self.factor = factor

    def for_batch(
        self, batch: Batch, layers: Sequence[Part], index: Int[torch.Tensor, "*at"] | None = None
    ) -> BatchChange:
        """Return the change of heads' outputs in a batch.

        Parameters
        ----------
        batch, layers
            Batch, and layers in which heads are changed; also other parts that are changed.
        index
            (...,) index into the batch's flattened (B T) positions, on the CPU; all positions
            (B, T) by default. Results at positions that are not changed are arbitrary.
        """
        return BatchChange(self.factor)

    def kinds(self, batch: Batch) -> Int[np.ndarray, "B T"]:
        """Return (B, T) numbers; equal numbers mean that equal prefixes get equal new outputs."""
        return np.zeros((len(batch.rows), batch.width), dtype=np.int64)


def prepare_change(
    to: Change,
    model: Model,
    prompts: Prompts,
    at: Bool[np.ndarray, "prompt position"],
    kinds: Collection[str] = (),
) -> PreparedChange:
    """Return a change prepared for a model and prompts.

    Parameters
    ----------
    to
        The change.
    model, prompts
        Model and prompts to measure.
    at
        (prompt, position) boolean: positions at which heads will be changed.
    kinds
        Kinds of other parts that will be changed: "mlp", "mixer", "extra", "embedding".

    Raises
    ------
    InputError
        If `to` is not a change, a position has no match in the reference prompts, or the
        reference prompts were made with another tokenizer.
    """
    check_change(to)
    if isinstance(to, Mean):
        to.reference.check_model(model)
        return _Averaged(model, prompts, at, to.reference, kinds)
    if isinstance(to, Resample):
        drawn = to.reference[_draw(base_of(prompts), to.reference, to.seed)]
        return _Donated(model, prompts, at, drawn)
    if isinstance(to, From):
        return _Donated(model, prompts, at, to.donor)
    if isinstance(to, Times):
        return PreparedChange(to.factor)
    if isinstance(to, Zero):
        return PreparedChange(0.0)
    raise NotImplementedError(f"prepare_change does not know {type(to).__name__}")


def _draw(prompts: Prompts, reference: Prompts, seed: int) -> Int[np.ndarray, " prompt"]:
    """Draw a donor for each prompt among the reference prompts that differ from it."""
    rng = np.random.default_rng([seed, 5])
    strings = np.array(reference.strings, dtype=object)
    donors = np.zeros(len(prompts), dtype=np.int64)
    for i, string in enumerate(prompts.strings):
        others = np.flatnonzero(strings != string)
        if not len(others):
            raise InputError("resample needs a reference prompt that differs from the prompt")
        donors[i] = int(rng.choice(others))
    return donors


class _Averaged(PreparedChange):
    """Change to the mean of z for each layer, head, role and number of demonstration.

    Reference prompts whose logits are not finite are left out.
    """

    def __init__(
        self,
        model: Model,
        prompts: Prompts,
        at: Bool[np.ndarray, "prompt position"],
        reference: Prompts,
        parts: Collection[str],
    ) -> None:
        reference_keys = position_keys(reference)
        numbers: dict[Key, int] = {}
        for row in reference_keys:
            for key in row:
                numbers.setdefault(key, len(numbers))
        for row, wanted in zip(position_keys(prompts), at, strict=True):
            for key, want in zip(row, wanted, strict=True):
                if want and key not in numbers:
                    raise InputError(
                        f"no reference prompt has a position of role {key[0]!r} in demonstration "
                        f"{key[1]}; take reference prompts with as many demonstrations"
                    )
        self.index = np.array([[numbers.get(k, 0) for k in row] for row in position_keys(prompts)])
        own = np.array([[numbers[k] for k in row] for row in reference_keys])
        means = _means(model, reference, own, len(numbers), frozenset(parts))
        note_missing("reference prompts", np.flatnonzero(~means.finite), len(reference))
        if (means.counts[self.index[at]] == 0).any():
            raise InputError(
                "no reference prompt with finite logits has a position that the mean needs: load "
                "the model with dtype='float32' or 'bfloat16', or take other reference prompts"
            )
        self.means = means.by_part

    def for_batch(
        self, batch: Batch, layers: Sequence[Part], index: Int[torch.Tensor, "*at"] | None = None
    ) -> BatchChange:
        keys = batch.cut(self.index)
        if index is not None:
            keys = keys.map(lambda x: x.flatten()[index])
        means = {n: self.means[n][keys.on(self.means[n].device)] for n in layers if n in self.means}
        return BatchChange(replacements=means)

    def kinds(self, batch: Batch) -> Int[np.ndarray, "B T"]:
        return batch.part(self.index)


@dataclass
class _Means:
    """Mean outputs over reference prompts, with one number for each key of positions.

    Attributes
    ----------
    by_part
        (key, H, d_head) by layer, and (key, d_model) of other parts, on the layer's device.
    counts
        (key,) positions of the mean.
    finite
        (prompt,) boolean: reference prompts in the mean.
    """

    by_part: dict[Part, torch.Tensor]
    counts: Int[np.ndarray, " key"]
    finite: Bool[np.ndarray, " prompt"]


def _means(
    model: Model,
    reference: Prompts,
    keys: Int[np.ndarray, "prompt position"],
    n_keys: int,
    parts: frozenset[str],
) -> _Means:
    """Return mean outputs; the last ones are remembered while the model stays as it is.

    No proof of a batch shows that a mean is of another model, and a model's state does not show
    every change. So all weights are compared, and the longest reference prompt is run again.
    """
    about = (reference.hash, parts, hash_weights(model.module))
    known = model.cache.get(MEANS)
    if known is None or known[0] != about or known[1] != _longest(model, reference):
        # The old ones go first: they may be large.
        model.cache.pop(MEANS, None)
        means = _measure_means(model, reference, keys, n_keys, parts)
        known = model.cache[MEANS] = (about, _longest(model, reference), means)
    found: _Means = known[2]
    return found


def _longest(model: Model, reference: Prompts) -> bytes:
    """Return the last residual stream of the longest reference prompt by itself.

    Nothing for a model on a server, whose weights users cannot change.
    """
    if model.remote:
        return b""
    batch = make_batch(model, reference, np.array([int(reference.lengths.argmax())]))
    (found,) = run_batch(model, batch, [_Stream()])
    return found["stream"].contiguous().view(torch.uint8).numpy().tobytes()


class _Stream(Recorder):
    """Records the residual stream after the last layer."""

    def finish(self, end: End) -> dict[str, torch.Tensor]:
        assert end.stream is not None
        return {"stream": end.stream.detach().clone()}


def _measure_means(
    model: Model,
    reference: Prompts,
    keys: Int[np.ndarray, "prompt position"],
    n_keys: int,
    parts: Collection[str],
) -> _Means:
    total: dict[Part, torch.Tensor] = {}
    finite = np.ones(len(reference), dtype=bool)
    feed = Batches(model, reference, kind="sums")

    def add(batch: Batch) -> None:
        recorders = [_Sums(batch.cut(keys), n_keys, parts), watch(batch, ())]
        sums, last = run_batch(model, batch, recorders)
        good = last[FINITE].numpy()
        finite[batch.rows] = good
        if good.all():
            for layer, summed in sums.items():
                total[layer] = total[layer] + summed if layer in total else summed
        elif good.any():  # the sum contains NaN: repeat without the bad prompts
            add(make_batch(model, reference, batch.rows[good]))

    for batch in feed:
        with feed.attempt():
            add(batch)
    there = finite[:, None] & (reference.token_id >= 0)
    counts = np.bincount(keys[there], minlength=n_keys)
    number = torch.as_tensor(np.maximum(counts, 1))
    devices = model.layer_devices
    means = {
        part: (x / number.view(-1, *[1] * (x.dim() - 1))).to(devices[layer_of(part)])
        for part, x in total.items()
    }
    return _Means(means, counts, finite)


def layer_of(part: Part) -> int:
    """Return the layer on whose device a part's output is."""
    return max(part[1], 0) if isinstance(part, tuple) else part


def outputs(
    view: LayerView | PassingView, kinds: Collection[str]
) -> Iterator[tuple[Part, Float[torch.Tensor, "B T *shape"]]]:
    """Return the outputs of a layer's heads, and of its other parts of some kinds."""
    others = {"mlp": view.mlp_write, "mixer": view.mixer_write}
    if isinstance(view, LayerView):
        yield view.index, view.z
        others["extra"] = view.more_write
    for kind, write in others.items():
        if kind in kinds and write is not None:
            yield (kind, view.index), write
    if view.index == 0 and "embedding" in kinds:
        yield ("embedding", -1), view.residual


class _Sums(Recorder):
    """Records sums of outputs over positions with the same key, without padding."""

    def __init__(self, index: Everywhere, n_keys: int, kinds: Collection[str]) -> None:
        self.index, self.n_keys, self.kinds = index, n_keys, kinds
        self.sums: dict[Any, torch.Tensor] = {}

    def layer(self, view: LayerView) -> None:
        self._add(view)

    def passing(self, view: PassingView) -> None:
        self._add(view)

    def _add(self, view: LayerView | PassingView) -> None:
        for part, output in outputs(view, self.kinds):
            real = view.mask.on(output.device)
            own = output.float() * real.view(*real.shape, *[1] * (output.dim() - 2))
            empty = own.new_zeros(self.n_keys, *own.shape[2:])
            index = self.index.on(own.device).flatten()
            self.sums[part] = empty.index_add(0, index, own.flatten(0, 1))

    def finish(self, end: End) -> dict[Any, torch.Tensor]:
        return self.sums


class _Donated(PreparedChange):
    """Change to the z of a donor prompt at matching positions."""

    def __init__(
        self,
        model: Model,
        prompts: Prompts,
        at: Bool[np.ndarray, "prompt position"],
        donors: Prompts,
    ) -> None:
        self.model = model
        self.donors = donors_of_sequences(model, prompts, donors)
        self.columns = donor_columns(prompts, at, self.donors)

    def for_batch(
        self, batch: Batch, layers: Sequence[Part], index: Int[torch.Tensor, "*at"] | None = None
    ) -> BatchChange:
        donors = make_batch(self.model, self.donors, batch.rows)
        columns = (torch.as_tensor(batch.part(self.columns)) + donors.width).clamp(min=0)
        columns = columns + torch.arange(len(columns))[:, None] * donors.width
        if index is not None:
            columns = columns.flatten()[index]
        recorder = _Heads(layers, Everywhere(columns, batch.devices))
        return BatchChange(replacements=recorder.found, donors=[Donors(donors, recorder)])

    def kinds(self, batch: Batch) -> Int[np.ndarray, "B T"]:
        return np.broadcast_to(np.arange(len(batch.rows))[:, None], (len(batch.rows), batch.width))


class _Heads(Recorder):
    """Records outputs of some parts, at an index (...,) into the batch's positions."""

    def __init__(self, parts: Sequence[Part], index: Everywhere) -> None:
        self.parts, self.index = set(parts), index
        self.kinds = {part[0] for part in parts if isinstance(part, tuple)}
        self.found: dict[Part, torch.Tensor] = {}

    def layer(self, view: LayerView) -> None:
        self._keep(view)

    def passing(self, view: PassingView) -> None:
        self._keep(view)

    def _keep(self, view: LayerView | PassingView) -> None:
        for part, output in outputs(view, self.kinds):
            if part in self.parts:
                self.found[part] = self.index.take(output)
