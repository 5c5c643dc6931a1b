"""Proof of completions: in a full forward, each token has the largest logit after those before it.

Generation reads keys and values from the cache of transformers and shares no number with a walk,
which also refuses what measures cannot follow and finds logits that are not finite.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from ..edits.edits import Edit
from ..errors import CheckError
from ..models.rounding import Rounding
from ..prompts.pieces import token_text
from ..prompts.sequences import with_completions
from ..results.findings import Finding
from ..walk.batch import Batch
from ..walk.not_finite import FINITE
from ..walk.recorder import Recorder
from ..walk.views import End
from .collect import collect
from .measure import MakeRecorder, Measure
from .predictions import reads

if TYPE_CHECKING:
    from ..models import Model
    from ..prompts import Prompts

IDENTITY = "completion"
"""Name of the identity in a proof."""


def prove_completions(
    model: Model, prompts: Prompts, tokens: Sequence[Sequence[int]], edits: Sequence[Edit]
) -> np.ndarray:
    """Check completions in one forward of prompts and tokens, without a cache.

    Parameters
    ----------
    model, prompts
        Model and prompts.
    tokens
        Tokens of each prompt's completion, with the end token; at least one.
    edits
        Edits that were active.

    Returns
    -------
    array (prompt,)
        Whether all logits are finite.

    Raises
    ------
    CheckError
        If another token has a larger logit than rounding explains.
    """
    sequences = with_completions(prompts, tokens)
    (found,) = collect(model, sequences, [_Gaps(max(map(len, tokens)))], edits=edits)
    finite = found[FINITE]
    rounding = Rounding.of(model)
    allowed = rounding.forward(model.dtype, model.n_layers)
    gaps = np.where(finite[:, None], found["gap"], 0)
    worst = np.unravel_index(int(gaps.argmax()), gaps.shape)
    error = float(gaps[worst])
    model.proof.add(IDENTITY, Finding(error, allowed))
    if error <= allowed:
        return finite
    if rounding.is_unsteady(model, error):
        model.proof.unsteady.add(IDENTITY)
        return finite
    row, step = map(int, worst)
    token = token_text(model.tokenizer, tokens[row][step])
    raise CheckError(
        f"{model.name}, prompt {row}: generation goes on with {token!r} as token {step}, which has "
        f"not the largest logit in a forward without a cache (error {error:.2g} of the largest "
        f"logit, at most {allowed:.2g} is accepted). Perhaps the model's cache leaves out what "
        "its attention sees, or a batch mixes prompts: try tt.set_options(batch_size=1)"
    )


@dataclass(frozen=True)
class _Gaps(Measure):
    """By how much other logits are larger than those of a completion's tokens."""

    group = "predictions"
    n_tokens: int = 1

    def memory_key(self) -> Hashable:
        return ("completions",)

    def prepare(self, model: Model, prompts: Prompts) -> MakeRecorder:
        return lambda batch: _GapsRecorder(batch, self.n_tokens)


class _GapsRecorder(Recorder):
    """Records the gap to the largest logit, over the largest absolute one, for each token."""

    group = "predictions"

    def __init__(self, batch: Batch, n_tokens: int) -> None:
        self.answers, self.n_tokens = batch.answers, n_tokens

    def finish(self, end: End) -> dict[str, torch.Tensor]:
        assert end.last_logits is not None
        logits = end.last_logits.to(end.logits.device)
        tokens, there = (x.on(logits.device) for x in (self.answers.tokens, self.answers.there))
        gaps = []
        for step, own in enumerate(reads(self.answers, logits)):
            chosen = own.gather(1, tokens[:, step])[:, 0]
            size = own.abs().nan_to_num(posinf=0).amax(dim=-1)
            gaps.append((own.amax(dim=-1) - chosen) / size.clamp(min=torch.finfo(size.dtype).tiny))
        found = torch.stack(gaps, dim=1).masked_fill(~there[:, :, 0], 0)
        missing = self.n_tokens - found.shape[1]
        return {"gap": torch.nn.functional.pad(found, (0, missing))}
