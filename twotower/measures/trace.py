"""Effects of every head on every token of a completion, such as a chain of thought."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..checks import check_is, several, shown, yes_or_no
from ..edits.changes import Change, Zero
from ..errors import InputError
from ..prompts.completions import Completions, read_completions
from ..prompts.sequences import with_completions
from ..results.missing import blank
from ..sweep.prepare import prepare_sweep
from ..walk.not_finite import FINITE
from .collect import collect
from .datasets import dataset
from .effects import Effects
from .measure import MakeRecorder
from .measurement import measurement

if TYPE_CHECKING:
    import xarray as xr

    from ..models import Model
    from ..prompts import Prompts
    from ..prompts.positions import Positions

ANSWER = "answer"
"""Name of the span of a completion that holds the final answer."""


@measurement
def trace_effects(
    model: Model,
    prompts: Prompts,
    completions: Sequence[str],
    positions: Positions = "last",
    *,
    to: Change = Zero(),
    spans: Sequence[Mapping[str, Any]] | None = None,
    keep: str | Sequence[str] | None = None,
    control_tokens: bool = False,
) -> xr.Dataset:
    """Return the effect of changing every head on every token of a completion.

    The completion is teacher-forced: each token's log-probability is given the prompt and the
    completion's earlier tokens. Every number equals that of a separate forward with one head
    changed; one walk sweeps all heads.

    Parameters
    ----------
    model, prompts
        Model and prompts to measure.
    completions
        For each prompt a text that follows it directly, such as a chain of thought; `complete`
        generates them.
    positions
        Positions at which a head's output is changed. "last": where the completion's tokens are
        predicted. "all": in the prompt too. Others as in `head_effects`; a role or a mask of the
        prompt's last position holds for the completion too.
    to
        New output of the head, as in `head_effects`. The completion follows donors as it follows
        the prompt. A mean is that of the references' last positions for all its tokens.
    spans
        For each prompt the places of its completion by name: a text that occurs in it once, or
        (start, end) in characters. The span "answer" is the final answer.
    keep
        Names of the spans whose tokens are stored; by default all tokens.
    control_tokens
        Whether completions may contain the tokenizer's control tokens, as those of `complete` may.

    Returns
    -------
    xarray.Dataset
        logprob (prompt, token) and logprob_drop (prompt, layer, head, token), in nat, with the
        coordinates token_text, token_number and span. With a span "answer" in every prompt also
        answer_logprob (prompt) and answer_drop (prompt, layer, head): sums over its tokens.

    Raises
    ------
    InputError
        If completions or spans do not fit the prompts, or no token has a span of `keep`; or as
        `head_effects`.
    """
    check_is(prompts, "Prompts", "prompts")
    if keep is not None and not isinstance(keep, str):
        keep = several("keep", keep)
        if not all(isinstance(name, str) for name in keep):
            raise InputError(f"keep={shown(keep)} must be names of spans")
    yes_or_no("control_tokens", control_tokens)
    read = read_completions(prompts, completions, spans, model.max_positions, control_tokens)
    kept = _kept(read, keep)
    sequences = with_completions(prompts, read.token_id)
    longest = int(sequences.target.shape[1])
    (found,) = collect(model, sequences, [_Trace(positions, to, n_tokens=longest)])
    finite = found.pop(FINITE)
    arrays = {
        "logprob": _taken(found["logprob"], kept),
        "logprob_drop": _taken(found["logprob_drop"], kept),
        FINITE: finite,
    }
    if all(ANSWER in names for names in read.span):
        of_answer = np.zeros((len(prompts), longest), dtype=bool)
        for row, names in enumerate(read.span):
            of_answer[row, : len(names)] = np.array(names) == ANSWER
        for name, total in (("logprob", "answer_logprob"), ("logprob_drop", "answer_drop")):
            values = found[name]
            mask = of_answer.reshape(len(prompts), *[1] * (values.ndim - 2), longest)
            summed = np.where(mask, values, 0).sum(axis=-1)
            arrays[total] = blank(summed.astype(np.float32), finite)
    measure = Effects(positions, to)
    keeping = [keep] if isinstance(keep, str) else keep
    settings = {**measure.settings(), "keep": keeping, "completions": sequences.hash}
    return dataset("trace", arrays, model, prompts, settings, coordinates=_coordinates(read, kept))


@dataclass(frozen=True, eq=False)
class _Trace(Effects):
    """Sweep that returns the log-probability of every token of a completion."""

    group = "trace"
    n_tokens: int = 0

    def prepare(self, model: Model, prompts: Prompts) -> MakeRecorder:
        return prepare_sweep(model, prompts, self.positions, self.to, tokens=self.n_tokens)


def _kept(read: Completions, keep: str | Sequence[str] | None) -> np.ndarray:
    """Return (prompt, kept) numbers of the tokens to store, -1 where there are fewer."""
    names = [keep] if isinstance(keep, str) else keep
    numbers = [
        [i for i, span in enumerate(spans) if names is None or span in names] for spans in read.span
    ]
    width = max(map(len, numbers))
    if not width:
        known = sorted({span for spans in read.span for span in spans if span})
        if not known:
            raise InputError(f"keep={keep!r}: the completions have no spans; pass spans= as well")
        raise InputError(f"keep={keep!r}: no token has such a span; there are {', '.join(known)}")
    kept = np.full((len(numbers), width), -1, dtype=np.int64)
    for row, own in enumerate(numbers):
        kept[row, : len(own)] = own
    return kept


def _taken(values: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """Return values (prompt, ..., token) at the tokens to store; NaN where there is none."""
    shape = (len(kept), *[1] * (values.ndim - 2), kept.shape[1])
    index = np.maximum(kept, 0).reshape(shape)
    found = np.take_along_axis(
        values, np.broadcast_to(index, (*values.shape[:-1], kept.shape[1])), -1
    )
    return np.where((kept < 0).reshape(shape), np.nan, found).astype(values.dtype)


def _coordinates(read: Completions, kept: np.ndarray) -> dict[str, Any]:
    def texts(by_prompt: list[list[str]]) -> np.ndarray:
        rows = [
            [own[i] if i >= 0 else "" for i in numbers]
            for own, numbers in zip(by_prompt, kept, strict=True)
        ]
        return np.array(rows, dtype=object)

    return {
        "token": np.arange(kept.shape[1]),
        "token_text": texts(read.token),
        "token_number": kept,
        "span": texts(read.span),
    }
