"""Running measures over all prompts, batch by batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from .. import progress
from ..edits.edits import Edit, as_edits
from ..edits.prepared_edits import PreparedEdits
from ..errors import SchemaError
from ..models.measuring import measuring
from ..options import option
from ..prompts.sequences import Continued, base_of, owners, with_answers
from ..results import GROUPS
from ..results.missing import blank, missing_value
from ..sweep.second_forward import prove_state
from ..walk.batch import Batch, make_batch
from ..walk.batch_size import Batches
from ..walk.judge import proved_batch
from ..walk.not_finite import FINITE, note_missing, watch
from ..walk.padding import prove_padding
from ..walk.recorder import Recorder
from ..walk.walk import donors_of
from .datasets import Arrays, kept_columns, measured_dataset
from .measure import Measure
from .measurement import measurement
from .predictions import Predictions
from .whole_answers import whole_answers

if TYPE_CHECKING:
    import xarray as xr

    from ..models import Model
    from ..prompts import Prompts


@measurement
def run(
    model: Model,
    prompts: Prompts,
    measure: Measure,
    *,
    edits: Edit | Sequence[Edit] = (),
) -> xr.Dataset:
    """Run a measure and return its dataset.

    Parameters
    ----------
    model, prompts
        Model and prompts to measure.
    measure
        Measure to run.
    edits
        Edits that are active during the forwards.
    """
    edits = as_edits(edits)
    (arrays,) = collect(model, prompts, [measure], edits=edits)
    more = {"edits": [edit.describe() for edit in edits]} if edits else {}
    return measured_dataset(measure, arrays, model, prompts, **more)


@measurement
def collect(
    model: Model,
    prompts: Prompts,
    measures: Sequence[Measure],
    *,
    edits: Sequence[Edit] = (),
    title: str | None = None,
) -> list[Arrays]:
    """Return the results of several measures from one forward per batch.

    If answers have several tokens, measures that score answers run on the prompts with every
    answer after them (see `whole_answers`), and the others on the prompts.

    Parameters
    ----------
    model, prompts
        Model and prompts to measure.
    measures
        Measures to run. Those with results by position must keep the same positions.
    edits
        Edits that are active during the forwards.
    title
        Title of the progress bar.

    Returns
    -------
    list of dict
        Arrays of each measure, over all prompts in their order. Arrays by position are
        right-aligned and NaN at padding. The entry "finite" (prompt,) marks prompts with
        finite logits; the values of other prompts are missing.
    """
    how: dict[str, Any] = {"edits": edits, "title": title}
    if not prompts.answers.several:
        return _collect(model, prompts, measures, **how)
    others = [measure for measure in measures if not measure.scores_answers]
    scoring = [measure for measure in measures if measure.scores_answers]
    rest = iter(_collect(model, prompts, others, **how) if others else [])
    scored = iter(_of_answers(model, prompts, scoring, **how) if scoring else [])
    return [next(scored if measure.scores_answers else rest) for measure in measures]


def _of_answers(
    model: Model, prompts: Prompts, measures: Sequence[Measure], **how: Any
) -> list[Arrays]:
    """Return the results of measures that score answers of several tokens."""
    sequences = with_answers(prompts)
    known = [i for i, measure in enumerate(measures) if isinstance(measure, Predictions)]
    every = measures if known else [*measures, Predictions()]
    found = _collect(model, sequences, every, **how)
    clean = found[known[0] if known else -1]
    return [whole_answers(sequences, arrays, clean) for arrays in found[: len(measures)]]


def _collect(
    model: Model,
    prompts: Prompts,
    measures: Sequence[Measure],
    *,
    edits: Sequence[Edit] = (),
    title: str | None = None,
) -> list[Arrays]:
    continued = isinstance(prompts, Continued)
    columns = kept_columns(prompts, kept_positions(measures))
    width = prompts.n_positions if columns is None else columns.shape[1]
    finite = np.ones(len(prompts), dtype=bool)
    results: list[Arrays] = [{} for _ in measures]
    gradients = any(measure.gradients for measure in measures)
    shared = continued or any(measure.shares_beginnings for measure in measures)
    with measuring(model), progress.bar(len(prompts), title) as bar:
        prepared = PreparedEdits(model, prompts, edits)
        makers = [measure.prepare(model, prompts) for measure in measures]
        edited = prepared.any
        key = (tuple(measure.memory_key() for measure in measures), edited, continued)
        feed = Batches(model, prompts, option("batch_size"), columns, shared, key)

        def record(batch: Batch) -> None:
            if option("proof"):
                prove_state(model, base_of(prompts))
                prove_padding(model, prompts, batch)
            recorders = [make(batch) for make in makers]
            ready = prepared.for_batch(batch)
            donors = donors_of(ready, recorders)
            recorders.append(watch(batch, donors))
            *found, last = proved_batch(model, batch, recorders, ready, gradients=gradients)
            good = last[FINITE].numpy()
            finite[batch.rows] = good
            for result, recorder, new in zip(results, recorders, found, strict=False):
                for name, tensor in new.items():
                    dims = () if continued else _dims(recorder, name)
                    _place(result, name, tensor, dims, batch.rows, len(prompts), width)
            for rows in _once_more(batch, good, recorders, found):
                record(make_batch(model, prompts, rows, columns))

        for batch in feed:
            # A separate function, so that its local tensors are freed if memory runs out.
            with feed.attempt():
                record(batch)
                bar.update(len(batch.rows))
    note_missing("prompts", np.unique(owners(prompts)[~finite]), len(base_of(prompts)))
    return [
        {**{name: blank(x, finite) for name, x in result.items()}, FINITE: finite}
        for result in results
    ]


def _dims(recorder: Recorder, name: str) -> tuple[str, ...]:
    """Return the dims of a recorder's result."""
    group = GROUPS.get(recorder.group, {})
    if name not in group:
        raise SchemaError(
            f"{type(recorder).__name__} returned {name!r} for the group {recorder.group!r}, which "
            f"the schema gives {', '.join(group) or 'no variables'}"
        )
    return group[name].dims


def _once_more(
    batch: Batch,
    good: np.ndarray,
    recorders: Sequence[Recorder],
    found: Sequence[Mapping[str, torch.Tensor]],
) -> list[np.ndarray]:
    """Return the prompts of this batch to measure again, as one array of numbers for each batch.

    Prompts of a batch share tensors, in which zero times NaN is NaN. If some prompts are not
    finite, the others are measured again without them. If prompts share rows, an overflow in
    one counterfactual may reach others; each prompt with such values is measured by itself.
    """
    if not good.all():
        return [batch.rows[good]] if good.any() else []
    if len(batch.rows) == 1:
        return []
    bad = np.zeros(len(batch.rows), dtype=bool)
    for recorder, new in zip(recorders, found, strict=False):
        if recorder.shares_rows:
            for tensor in new.values():
                bad |= ~tensor.isfinite().flatten(1).all(dim=1).numpy()
    return [batch.rows[i : i + 1] for i in np.flatnonzero(bad)]


def kept_positions(measures: Sequence[Measure]) -> Any:
    """Return the positions at which measures keep results."""
    kept = [measure.keep for measure in measures if "position" in measure.dims]
    return kept[0] if kept else "all"


def _place(
    result: Arrays,
    name: str,
    tensor: torch.Tensor,
    dims: tuple[str, ...],
    rows: np.ndarray,
    n: int,
    width: int,
) -> None:
    """Write a batch's rows into the array over all prompts."""
    values = tensor.numpy()
    if values.dtype.kind == "f" and np.isinf(values).any():
        values = np.where(np.isinf(values), np.nan, values)  # an overflow is a missing value
    shape, target = [n, *values.shape[1:]], [slice(None)] * values.ndim
    if "position" in dims:
        axis = dims.index("position")
        shape[axis] = width
        target[axis] = slice(width - values.shape[axis], None)
    if name not in result:
        result[name] = np.full(shape, missing_value(values.dtype), dtype=values.dtype)
    result[name][tuple(target)][rows] = values
