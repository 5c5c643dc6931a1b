"""Greedy completions token by token, each from a forward of the whole text without a cache.

Slower than generation, but all edits act on generated tokens as on answers of several tokens.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ..edits.edits import Edit
from ..prompts.sequences import with_completions
from ..walk.batch import Batch
from ..walk.not_finite import FINITE
from ..walk.recorder import Recorder
from ..walk.views import End
from .collect import collect
from .measure import MakeRecorder, Measure

if TYPE_CHECKING:
    from ..models import Model
    from ..prompts import Prompts


def step_by_step(
    model: Model,
    prompts: Prompts,
    max_tokens: int,
    edits: Sequence[Edit],
    ends: Collection[int | None],
) -> list[list[int]]:
    """Return the tokens of each prompt's completion, with the end token.

    Parameters
    ----------
    model, prompts
        Model and prompts to complete.
    max_tokens
        Largest number of tokens.
    edits
        Edits that are active at every step.
    ends
        End tokens.
    """
    found: list[list[int]] = [[] for _ in prompts]
    for _ in range(max_tokens):
        # The last token is only read for, so it may be any.
        sequences = with_completions(prompts, [[*ids, 0] for ids in found])
        (chosen,) = collect(model, sequences, [_Next()], edits=edits)
        for ids, token, finite in zip(found, chosen["next"], chosen[FINITE], strict=True):
            if not ids or ids[-1] not in ends:
                ids.append(int(token) if finite else 0)
        if all(ids[-1] in ends for ids in found):
            break
    return found


@dataclass(frozen=True)
class _Next(Measure):
    """The token with the largest logit after each sequence."""

    group = "predictions"

    def memory_key(self) -> Hashable:
        return ("completions",)

    def prepare(self, model: Model, prompts: Prompts) -> MakeRecorder:
        return _NextRecorder


class _NextRecorder(Recorder):
    """Records the token with the largest logit at the last position of every sequence."""

    group = "predictions"

    def __init__(self, batch: Batch) -> None:
        pass

    def finish(self, end: End) -> dict[str, torch.Tensor]:
        return {"next": end.logits.argmax(dim=-1)}
