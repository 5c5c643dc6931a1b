"""Edges: which parts of the model feed a head's queries, keys and values, by exact effects."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..checks import one_of, several, yes_or_no
from ..edits.changes import Change, Zero, check_change
from ..edits.sources import as_sources, name_of
from ..edits.wiring import INTO
from ..errors import InputError
from ..head import Head, check_heads
from ..prompts.positions import named
from ..sweep.edge_list import Edges
from ..sweep.prepare_edges import make_edges, prepare_edges
from .collect import collect
from .datasets import dataset
from .effects import sweep_key
from .measure import MakeRecorder, Measure
from .measurement import measurement

if TYPE_CHECKING:
    import xarray as xr

    from ..models import Model
    from ..prompts import Prompts
    from ..prompts.positions import Positions


@measurement
def edge_effects(
    model: Model,
    prompts: Prompts,
    sources: Any = None,
    targets: Sequence[tuple[int, int]] | None = None,
    *,
    into: str | Sequence[str] = INTO,
    positions: Positions = "all",
    outputs: Positions = "last",
    to: Change = Zero(),
    logprobs: bool = False,
) -> xr.Dataset:
    """Return the effect of every source on the answer through each target's queries, keys, values.

    A source's output is taken out of what the target reads, directly: everything between them is
    as in the clean run. The target's output changes, and all above it follows. Every number equals
    that of a separate forward (path patching).

    Parameters
    ----------
    model, prompts
        Model and prompts to measure.
    sources
        Heads (layer, head), "2.5", "mlp 2", "embedding"; a list of them inside the list is
        changed together. "heads" for all heads; by default all heads, MLPs and the embedding.
    targets
        Heads into which edges lead; by default all.
    into
        Some of "q", "k" and "v": what of the target reads the changed stream. Its queries do so
        at `outputs`, its keys and values at `positions`. If query heads share
        keys and values, only the target's own view of them changes.
    positions
        Positions at which keys and values read the changed stream, as in `head_effects`.
    outputs
        Positions at which the target's output changes: by default where the answer is predicted.
        "labels" asks what feeds heads that gather at label positions.
    to
        New output of the sources, as in `head_effects`; of MLPs and the embedding, what they add
        to the residual stream.
    logprobs
        Whether to return drops of log-probabilities too.

    Returns
    -------
    xarray.Dataset
        margin_drop (prompt, source, target, into), positive if the edge helps the answer; with
        `logprobs` also logprob_drop (prompt, source, target, into, label), in nat. NaN where the
        source is not below what the target reads.

    Raises
    ------
    InputError
        If a source or target does not exist, no source is below a target, or as `head_effects`.

    Notes
    -----
    Where a norm stands between a source and the residual stream, the write is the difference that
    the source makes to this norm's output. A target's gate and its sinks stay as in the clean run.

    References
    ----------
    Wang et al. (2022), "Interpretability in the wild", arXiv:2211.00593 (path patching).
    """
    edges = edges_of(model, sources, targets, into)
    measure = EdgeEffects(edges, positions, outputs, to, logprobs)
    (arrays,) = collect(model, prompts, [measure])
    return dataset(
        "edges",
        arrays,
        model,
        prompts,
        measure.settings(),
        coordinates=measure.coordinates(),
        absent={("source", "target", "into"): ~edges.exist},
    )


def edges_of(model: Model, sources: Any, targets: Any, into: str | Sequence[str] = INTO) -> Edges:
    """Return the edges that a user asks for, checked.

    Raises
    ------
    InputError
        As `edge_effects`.
    """
    wanted = [into] if isinstance(into, str) else several("into", into)
    for name in wanted:
        one_of("into", name, INTO)
    if not wanted or len(set(wanted)) < len(wanted):
        raise InputError(f"into={into!r} must name some of q, k and v, each once")
    heads = model.heads if targets is None else check_heads(targets, model)
    if not heads:
        raise InputError("there are no targets")
    return make_edges(model, as_sources(model, sources), heads, wanted)


@dataclass(frozen=True, eq=False)
class EdgeEffects(Measure):
    """The measure behind `edge_effects`, with its settings."""

    group = "edges"
    scores_answers = True

    edges: Edges
    positions: Positions = "all"
    outputs: Positions = "last"
    to: Change = Zero()
    logprobs: bool = False

    def __post_init__(self) -> None:
        check_change(self.to)
        yes_or_no("logprobs", self.logprobs)

    def prepare(self, model: Model, prompts: Prompts) -> MakeRecorder:
        return prepare_edges(
            model,
            prompts,
            self.edges,
            self.positions,
            self.to,
            self.outputs,
            logprobs=self.logprobs,
        )

    def settings(self) -> dict[str, Any]:
        places = {"positions": named(self.positions), "outputs": named(self.outputs)}
        return {**places, **self.to.describe()}

    def coordinates(self) -> Mapping[str, Any]:
        return {
            "source": [name_of(group) for group in self.edges.sources],
            "target": [str(Head(*target)) for target in self.edges.targets],
            "into": list(self.edges.into),
        }

    def memory_key(self) -> Hashable:
        key = sweep_key(self.positions, self.to, self.logprobs)
        outputs = self.outputs if isinstance(self.outputs, str) else "given"
        return (*key, "edges", outputs, len(self.edges.listed).bit_length(), self.edges.into)
