"""Scores of answers of several tokens, from sequences of a prompt and the answers' tokens."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ..prompts.sequences import Continued
from ..walk.not_finite import FINITE


def whole_answers(
    sequences: Continued, arrays: Mapping[str, np.ndarray], clean: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Return a measure's arrays by prompt, from those by sequence.

    Parameters
    ----------
    sequences
        Sequences that together serve every answer of every prompt.
    arrays
        The measure's arrays (sequence, ..., label): "logprob", "logprob_drop".
    clean
        Arrays of the predictions, from which margins are made.
    """
    prompts = sequences.base
    gold, alone = prompts.gold_index, prompts.answers.alone
    source = sequences.source
    labels = np.arange(source.shape[1])

    def by_prompt(
        values: np.ndarray,
    ) -> np.ndarray:  # (sequence, ..., label) to (prompt, ..., label)
        found: np.ndarray = np.moveaxis(np.moveaxis(values, -1, 1)[source, labels], 1, -1)
        return found

    def weighted(scores: np.ndarray) -> np.ndarray:
        weights = prompts.answers.weights
        found: np.ndarray = scores * weights.reshape(len(prompts), *[1] * (scores.ndim - 2), -1)
        return found

    finite = np.ones(len(prompts), dtype=bool)
    np.logical_and.at(finite, sequences.owner, arrays[FINITE])
    before = weighted(by_prompt(clean["logprob"]))
    if "logprob_drop" in arrays:
        drop = weighted(by_prompt(arrays["logprob_drop"]))
        expanded = before.reshape(len(before), *[1] * (drop.ndim - 2), -1)
        lost = margins(expanded, gold) - margins(expanded - drop, gold)
        drop = drop.astype(np.float32)
        return {"margin_drop": lost.astype(np.float32), "logprob_drop": drop, FINITE: finite}
    greedy = by_prompt(arrays["greedy"])
    best = np.take_along_axis(greedy, gold[:, None], axis=1)[:, 0]
    first = np.searchsorted(sequences.owner, np.arange(len(prompts)))
    return {
        "logprob": before.astype(np.float32),
        "margin": margins(before, gold).astype(np.float32),
        "correct": best if alone else before.argmax(axis=1) == gold,
        "top_token": arrays["top_token"][first],
        "top1_correct": best,
        FINITE: finite,
    }


def margins(scores: np.ndarray, gold: np.ndarray) -> np.ndarray:
    """Return the right answer's score less the largest other one, (prompt, ...).

    Parameters
    ----------
    scores
        (prompt, ..., label). Of one answer the result is its score.
    gold
        (prompt,) index of the right answer.
    """
    if scores.shape[-1] == 1:
        return np.asarray(scores[..., 0])
    right = np.arange(scores.shape[-1]) == gold.reshape(-1, *[1] * (scores.ndim - 1))
    right = np.broadcast_to(right, scores.shape)
    top = np.where(right, scores, -np.inf).max(axis=-1)
    return np.asarray(top - np.where(right, -np.inf, scores).max(axis=-1))
