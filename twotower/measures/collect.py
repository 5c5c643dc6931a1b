"""Running recorders over all batches, and putting their results into datasets."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..errors import InputError
from ..intervention import Edit, named
from ..models.measuring import measuring
from ..options import option
from ..results import GROUPS, make_dataset, provenance
from ..results.missing import blank, count_values, mark_missing, missing_value
from .batch import Batch, columns_of, make_batch
from .batch_size import Batches
from .edits import PreparedEdits, position_mask
from .judge import proved_batch
from .missing import FINITE, tell, tell_values, watch
from .second_forward import prove_state
from .walk import Recorder, donors_of

if TYPE_CHECKING:
    import xarray as xr

    from ..intervention import Positions
    from ..models import Model
    from ..prompts import Prompts

MakeRecorder = Callable[[Batch], Recorder]
Arrays = dict[str, np.ndarray]

BY_POSITION = ("qk", "ov", "residual")
"""Groups of which chosen positions can be kept."""


def collect(
    model: Model,
    prompts: Prompts,
    makers: Sequence[MakeRecorder],
    *,
    batch_size: int | None = None,
    keep: Positions = "all",
    edits: Sequence[Edit] = (),
    shared: bool = False,
    gradients: bool = False,
    kind: Hashable = None,
    progress: bool | str = False,
) -> list[Arrays]:
    """Results of several recorders from one forward per batch.

    Parameters
    ----------
    model, prompts
        What is measured.
    makers
        Each makes a recorder for a batch.
    batch_size
        Prompts in a batch; by default see `twotower.measures.batch_size`.
    keep
        Positions at which per-position results are kept.
    edits
        Edits in force during the forwards.
    shared
        Whether prompts that begin alike should come into one batch.
    gradients
        Whether recorders take gradients.
    kind
        What the recorders are, as far as they differ in the memory that they take.
    progress
        True, or a text, to show a bar.

    Returns
    -------
    list of dict
        For each recorder its arrays, over all prompts in their order. Arrays by position
        are right-aligned and NaN where padded. Beside them "finite" (prompt,): prompts whose
        logits are finite; values of the others are missing.
    """
    columns = kept_columns(prompts, keep)
    width = prompts.n_positions if columns is None else columns.shape[1]
    prepared = PreparedEdits(model, prompts, edits)
    finite = np.ones(len(prompts), dtype=bool)
    results: list[Arrays] = [{} for _ in makers]
    with measuring(model), _bar(len(prompts), progress) as bar:
        kind = (kind, gradients, bool(prepared.outputs or prepared.attention))
        feed = Batches(model, prompts, batch_size, columns, shared, kind)

        def measure(batch: Batch) -> None:
            if option("proof"):
                prove_state(model, prompts)
            recorders = [make(batch) for make in makers]
            ready = prepared.for_batch(batch)
            donors = donors_of(ready, recorders)
            recorders.append(watch(batch, prompts.label_ids, donors))
            *found, last = proved_batch(model, batch, recorders, ready, gradients=gradients)
            good = last[FINITE].numpy()
            finite[batch.rows] = good
            for result, recorder, new in zip(results, recorders, found, strict=False):
                for name, tensor in new.items():
                    dims = GROUPS[recorder.group][name].dims
                    _place(result, name, tensor, dims, batch.rows, len(prompts), width)
            for rows in _once_more(batch, good, recorders, found):
                measure(make_batch(model, prompts, rows, columns))

        for batch in feed:
            # In a function of its own, which lets go of everything if memory runs out.
            with feed.attempt():
                measure(batch)
                bar.update(len(batch.rows))
    tell("prompts", np.flatnonzero(~finite), len(prompts))
    return [
        {**{name: blank(x, finite) for name, x in result.items()}, FINITE: finite}
        for result in results
    ]


def _once_more(
    batch: Batch,
    good: np.ndarray,
    recorders: Sequence[Recorder],
    found: Sequence[Mapping[str, torch.Tensor]],
) -> list[np.ndarray]:
    """Numbers of prompts that are measured again, in batches without those that are not finite.

    Prompts of a batch have tensors in common, where zero times NaN is NaN. So whatever stood
    beside a prompt that is not finite is measured without it. Where prompts share rows, a
    counterfactual that overflows in one may reach others: each is measured by itself.
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


def kept_columns(prompts: Prompts, keep: Positions) -> np.ndarray | None:
    """(prompt, K) columns of the positions that are kept, as `columns_of`; None for all.

    Raises
    ------
    InputError
        If the name is not known, or no position is meant.
    """
    if isinstance(keep, str) and keep not in ("all", "labels", "last"):
        raise InputError(f"keep={keep!r} is not known; use 'all', 'labels' or 'last'")
    if isinstance(keep, str) and keep == "all":
        return None
    columns = columns_of(position_mask(prompts, keep))
    if not columns.size:
        raise InputError("keep means no position: nothing would be kept")
    return columns


def _bar(total: int, progress: bool | str) -> Any:
    from tqdm.auto import tqdm

    description = progress if isinstance(progress, str) else None
    return tqdm(total=total, desc=description, unit="prompt", disable=not progress, leave=False)


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
        values = np.where(np.isinf(values), np.nan, values)  # what overflowed is missing
    shape, target = [n, *values.shape[1:]], [slice(None)] * values.ndim
    if "position" in dims:
        axis = dims.index("position")
        shape[axis] = width
        target[axis] = slice(width - values.shape[axis], None)
    if name not in result:
        result[name] = np.full(shape, missing_value(values.dtype), dtype=values.dtype)
    result[name][tuple(target)][rows] = values


def dataset(
    group: str,
    arrays: Arrays,
    model: Model,
    prompts: Prompts,
    *,
    keep: Positions = "all",
    coordinates: Mapping[str, Any] | None = None,
    **settings: Any,
) -> xr.Dataset:
    """A group's dataset from its arrays, with coordinates and provenance.

    Parameters
    ----------
    group
        Name of the group.
    arrays
        Arrays by variable; token ids of "top_token" are turned into text here. "finite"
        (prompt,), as `collect` gives it, says which prompts are missing; by default none.
    model, prompts
        What was measured.
    keep
        Which positions the arrays hold.
    coordinates
        Further index coordinates.
    **settings
        The measure's own arguments, for the record.
    """
    variables = GROUPS[group]
    arrays = dict(arrays)
    finite = arrays.pop(FINITE, np.ones(len(prompts), dtype=bool))
    dims = {dim for name in arrays for dim in variables[name].dims}
    coords: dict[str, Any] = {
        "prompt": np.arange(len(prompts)),
        "gold": prompts.gold,
        "query_class": prompts.query_class,
    }
    if "layer" in dims:
        coords["layer"] = np.arange(model.n_layers)
    if "head" in dims:
        coords["head"] = np.arange(model.n_heads)
    if "feature" in dims:
        coords["feature"] = np.arange(model.d_model)
    if "label" in dims:
        coords["label"] = np.array(prompts.labels, dtype=object)
    by_position = {
        name: getattr(prompts, name)
        for name in ("role", "demonstration", "demonstration_class", "label_text")
    }
    columns = np.arange(prompts.n_positions)
    kept = kept_columns(prompts, keep)
    if kept is not None:
        columns = np.arange(kept.shape[1])
        fills: dict[str, str | int] = {"role": "pad", "demonstration": -1}
        for name, array in by_position.items():
            fill = fills.get(name, "")
            taken = np.take_along_axis(array, np.maximum(kept, 0), axis=1)
            by_position[name] = np.where(kept < 0, fill, taken)
        by_position["token_position"] = kept - prompts.n_positions + 1
    coords |= {"position": columns - len(columns) + 1, **by_position, **(coordinates or {})}
    texts = {
        name: _texts(array, model) if name == "top_token" else array
        for name, array in arrays.items()
    }
    settings = {"keep": named(keep), **settings} if group in BY_POSITION else settings
    about = provenance(model, prompts, **settings)
    described = {name: (variables[name].dims, array) for name, array in arrays.items()}
    values = count_values(described, finite, by_position["role"] == "pad")
    tell_values(group, values)
    about |= {"not_finite": int((~finite).sum()), "not_finite_values": values}
    return mark_missing(make_dataset(group, texts, coords, about), finite=finite)


def _texts(ids: np.ndarray, model: Model) -> np.ndarray:
    """Tokens' texts; "" where there is no token."""
    known = {int(i): "" if i < 0 else model.tokenizer.decode([int(i)]) for i in np.unique(ids)}
    return np.array([known[int(i)] for i in ids.ravel()], dtype=object).reshape(ids.shape)
