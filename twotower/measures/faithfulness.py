"""Faithfulness: how much of the margin a few heads or edges keep when all others are taken away."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr

from ..checks import several, whole
from ..edits.changes import Change, Mean, check_change
from ..edits.cut import all_edges
from ..edits.edits import CutEdges, Edit, KnockOut
from ..edits.sources import Source
from ..errors import InputError
from ..head import as_head, check_heads
from ..prompts.positions import named
from ..results.missing import blank
from ..statistics import mean_known
from ..walk.not_finite import FINITE
from .datasets import dataset
from .measurement import measurement
from .predict import predict

if TYPE_CHECKING:
    from ..models import Model
    from ..prompts import Prompts
    from ..prompts.positions import Positions

Ranking = Sequence[Any] | xr.Dataset

SIZES = tuple(2**i for i in range(7))
"""Default numbers of heads or edges to keep."""

LISTED = 1000
"""Heads or edges of a ranking that the record lists; large models have millions of edges."""


@measurement
def faithfulness(
    model: Model,
    prompts: Prompts,
    rankings: Mapping[str, Ranking],
    *,
    sizes: Sequence[int] | None = None,
    to: Change | None = None,
    outputs: Positions = "last",
) -> xr.Dataset:
    """Return the margin that is left when only the first heads, or edges, of a ranking are kept.

    Of rankings of heads, all other heads are changed at all positions; MLPs and embeddings stay.
    Of rankings of edges, all other edges into heads' queries, keys and values are cut
    (`CutEdges`), and all other edges from heads into the answer; what MLPs read and write to the
    answer stays.

    Parameters
    ----------
    model, prompts
        Model and prompts to measure, best other ones than those on which heads were chosen.
    rankings
        Lists of heads by name, strongest first, such as `circuit_heads` of a circuit and
        `in_context_heads` of effects; or of edges (source, target, into), or results of
        `circuit`, whose edges are ordered by their absolute mean effect.
    sizes
        Numbers of heads or edges to keep; by default 1, 2, 4, ... up to 64, as far as the model has
        so many. A ranking that is shorter keeps all that it has.
    to
        New output of the other heads, or of the sources of other edges; by default their mean
        over the prompts.
    outputs
        For edges: positions at which heads read, as in `CutEdges`. A circuit that was searched
        with `before_last=True` explains outputs at "all".

    Returns
    -------
    xarray.Dataset
        margin (prompt, ranking, size); margin_clean and margin_without (prompt): with all heads
        or edges, and with none. kept (ranking, size): share of the mean margin between the two;
        area (ranking): mean of `kept` over the logarithm of the size.

    Raises
    ------
    InputError
        If there is no ranking or an empty one, rankings of heads and of edges are mixed, a size is
        not a whole number from 1 to the number of all heads or edges, or the margin with all is not
        larger than that without; or if no prompt is finite in all of them.
    """
    if not isinstance(rankings, Mapping):
        raise InputError("rankings must be a dict: lists of heads or edges by name")
    if not rankings:
        raise InputError("there are no rankings of heads or edges")
    for name, ranking in rankings.items():
        if not _is_circuit(ranking) and not several(f"rankings[{name!r}]", ranking):
            raise InputError(f"the ranking {name!r} is empty")
    to = Mean(prompts) if to is None else to
    check_change(to)
    kinds = {name: _are_edges(ranking) for name, ranking in rankings.items()}
    if len(set(kinds.values())) > 1:
        raise InputError("rankings of heads and of edges cannot be compared; give one kind")
    of_edges = any(kinds.values())
    find = _edges if of_edges else check_heads
    every: Sequence[Any] = _edges(all_edges(model), model) if of_edges else model.heads
    checked = {name: find(ranking, model) for name, ranking in rankings.items()}
    for name, own in checked.items():
        unknown = sorted(set(own) - set(every))
        if unknown:
            raise InputError(
                f"{_text(unknown[0])!r} in the ranking {name!r} is no edge from a source into a "
                "head above it, or from a head into the answer"
            )
    given = SIZES if sizes is None else several("sizes", sizes)
    counts = sorted({whole("sizes", size, 1) for size in given})
    if sizes is None:
        counts = [n for n in counts if n <= len(every)]
    elif counts and counts[-1] > len(every):
        kind = "edges" if of_edges else "heads"
        raise InputError(f"sizes={counts[-1]}, but the model has only {len(every)} {kind}")
    if not counts:
        raise InputError("there are no sizes")

    def margin(kept: Sequence[Any]) -> np.ndarray:
        others = sorted(set(every) - set(kept))
        edit: list[Edit] = []
        if others and of_edges:
            edit = [CutEdges(others, positions="all", outputs=outputs, to=to)]
        elif others:
            edit = [KnockOut(others, positions="all", to=to)]
        return np.asarray(predict(model, prompts, edit)["margin"].values)

    margins, clean, without = _margins(margin, every, checked.values(), counts)
    # A mean over some prompts cannot be compared with one over others.
    finite = np.isfinite(clean) & np.isfinite(without) & np.isfinite(margins).all(axis=(1, 2))
    if not finite.any():
        raise InputError(
            "no prompt is finite with all heads, with none and with each ranking: load the model "
            "with dtype='float32' or 'bfloat16'"
        )
    margins, clean, without = (blank(x, finite) for x in (margins, clean, without))
    span = float(mean_known(clean) - mean_known(without))
    if not span > 0:
        kind = "edges" if of_edges else "heads"
        raise InputError(f"the margin with all {kind} is not larger than the margin without {kind}")
    kept = (mean_known(margins) - mean_known(without)) / span
    logs = np.log2(counts)
    width = logs[-1] - logs[0]
    area = kept[:, 0] if not width else np.trapezoid(kept, logs, axis=1) / width
    arrays = {
        "margin": margins,
        "margin_clean": clean,
        "margin_without": without,
        "kept": kept,
        "area": area,
        FINITE: finite,
    }
    listed = {name: [_text(item) for item in own[:LISTED]] for name, own in checked.items()}
    lengths = {name: len(own) for name, own in checked.items()}
    settings: dict[str, Any] = {"rankings": listed, "ranked": lengths, **to.describe()}
    if of_edges:
        settings["outputs"] = named(outputs)
    coordinates = {"ranking": list(checked), "size": counts}
    return dataset("faithfulness", arrays, model, prompts, settings, coordinates=coordinates)


def _margins(
    margin: Callable[[Sequence[Any]], np.ndarray],
    every: Sequence[Any],
    rankings: Iterable[Sequence[Any]],
    counts: Sequence[int],
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return margins (prompt, ranking, size), and those with all items and with none."""
    known = {frozenset(every): margin(every), frozenset(): margin([])}
    clean, without = known.values()
    rows = []
    for ranking in rankings:
        row = []
        for size in counts:
            key = frozenset(ranking[:size])
            if key not in known:
                known[key] = margin(ranking[:size])
            row.append(known[key])
        rows.append(row)
    return np.moveaxis(np.array(rows, dtype=np.float32), -1, 0), clean, without


def _is_circuit(ranking: Any) -> bool:
    if not isinstance(ranking, (xr.Dataset, xr.DataArray)):
        return False
    if "source_name" not in getattr(ranking, "data_vars", ()):
        raise InputError("a ranking that is a dataset must be the result of circuit()")
    return True


def _are_edges(ranking: Ranking) -> bool:
    if _is_circuit(ranking):
        return True
    items = list(ranking)
    return isinstance(items[0], (tuple, list)) and len(items[0]) == 3


def _edges(ranking: Ranking, model: Model) -> list[tuple[str, str, str]]:
    """Return edges by name, each once."""
    if isinstance(ranking, xr.Dataset):
        order = abs(ranking["mean_effect"]).argsort().values[::-1]
        names = (ranking[name].values[order] for name in ("source_name", "target_name", "tower"))
        ranking = list(zip(*names, strict=True))
    return list(dict.fromkeys((_name(edge[0]), _name(edge[1]), str(edge[2])) for edge in ranking))


def _name(part: Any) -> str:
    return str(part if isinstance(part, (str, Source)) else as_head(part))


def _text(item: Any) -> str:
    return " ".join(item) if len(item) == 3 else str(item)
