"""The measure and the recorder of the model's answers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float

from ..walk.batch import Batch, BatchAnswers
from ..walk.recorder import Recorder
from ..walk.tensors import margin
from ..walk.views import End
from .measure import MakeRecorder, Measure

if TYPE_CHECKING:
    from ..models import Model
    from ..prompts import Prompts


@dataclass(frozen=True)
class Predictions(Measure):
    """The measure behind `predict`."""

    group = "predictions"
    scores_answers = True

    def prepare(self, model: Model, prompts: Prompts) -> MakeRecorder:
        return PredictionsRecorder


class PredictionsRecorder(Recorder):
    """Records the model's answers at the last position."""

    group = "predictions"

    def __init__(self, batch: Batch) -> None:
        self.gold, self.answers = batch.gold, batch.answers

    def finish(self, end: End) -> dict[str, torch.Tensor]:
        logits = end.logits
        if self.answers.continued:
            return self._of_answers(end)
        gold, ids = (x.on(logits.device) for x in (self.gold, self.answers.ids))
        labels = logits.gather(1, ids)
        logprob = labels - logits.logsumexp(dim=-1, keepdim=True)
        top = logits.argmax(dim=-1)
        top1_correct = top == ids.gather(1, gold[:, None])[:, 0]
        return {
            "logit": labels,
            "logprob": logprob,
            "margin": margin(logprob if self.answers.alone else labels, gold),
            "correct": top1_correct if self.answers.alone else labels.argmax(dim=-1) == gold,
            "top_token": top,
            "top1_correct": top1_correct,
        }

    def _of_answers(self, end: End) -> dict[str, torch.Tensor]:
        """Return what all tokens of the answers give; NaN or False for those of other sequences.

        `whole_answers` makes the predictions of it.
        """
        assert end.last_logits is not None
        logits = end.last_logits.to(end.logits.device)
        tokens, there = (x.on(logits.device) for x in (self.answers.tokens, self.answers.there))
        top = torch.stack([own.argmax(dim=-1) for own in reads(self.answers, logits)], dim=1)
        greedy = ((top.unsqueeze(-1) == tokens) | ~there).all(dim=1)
        return {
            "logprob": answer_logprobs(self.answers, end),
            "greedy": greedy & there.any(dim=1),
            "top_token": top[:, 0],
        }


def answer_logprobs(answers: BatchAnswers, end: End) -> Float[torch.Tensor, "B label"]:
    """Return the sums of the log-probabilities of answers' tokens; NaN for absent answers."""
    assert end.last_logits is not None
    logits = end.last_logits.to(end.logits.device)
    tokens, there = (x.on(logits.device) for x in (answers.tokens, answers.there))
    found = [
        own.gather(1, tokens[:, step]) - own.logsumexp(dim=-1, keepdim=True)
        for step, own in enumerate(reads(answers, logits))
    ]
    total = torch.stack(found, dim=1).masked_fill(~there, 0).sum(dim=1)
    return total.masked_fill(~there.any(dim=1), torch.nan)


def reads(
    answers: BatchAnswers, logits: Float[torch.Tensor, "B kept vocabulary"]
) -> Iterator[Float[torch.Tensor, "B vocabulary"]]:
    """Yield the logits at each position that is read, in float32; one at a time, to save memory."""
    places = answers.reads.on(logits.device)
    kept = places - places[:, -1:] - 1 + logits.shape[1]
    for step in range(places.shape[1]):
        at = kept[:, step, None, None].expand(-1, 1, logits.shape[2])
        yield logits.gather(1, at)[:, 0].float()
