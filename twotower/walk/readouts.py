"""Readouts of batches, where prompts may have very many different answers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .readout import Readout, bytes_per_label, get_readout

if TYPE_CHECKING:
    from ..models import Model
    from ..prompts import Prompts
    from .batch import Batch

WINDOW_BYTES = 1 << 29
"""Bytes of label directions that are made at a time; the answers of a batch are kept together."""


def labels_at_once(model: Model) -> int:
    """Return the number of labels whose directions are made at a time."""
    return max(1, WINDOW_BYTES // bytes_per_label(model))


def fits(model: Model, prompts: Prompts) -> bool:
    """Return whether the directions of all answers are made at once."""
    answers = prompts.answers
    return answers.columns is None or len(answers.vocabulary) <= labels_at_once(model)


class Readouts:
    """Readouts of the answers of batches.

    If all answers are too many, directions are made for those of a batch and of the prompts that
    come next. A readout costs one trace, so a few prompts at a time would cost more than measuring
    them.

    Parameters
    ----------
    model, prompts
        Model and prompts to measure.
    """

    def __init__(self, model: Model, prompts: Prompts) -> None:
        self.model, self.vocabulary = model, np.array(prompts.answers.vocabulary)
        self.most = labels_at_once(model)
        n = len(self.vocabulary) if fits(model, prompts) else self.most
        self.window = np.arange(n)
        _ = self.any_labels  # made now, so that no batch waits for it in vain

    @property
    def any_labels(self) -> Readout:
        """A readout for what does not depend on labels."""
        return get_readout(self.model, tuple(self.vocabulary[self.window].tolist()))

    def of(self, batch: Batch) -> Readout:
        """Return the readout of the answers of a batch's prompts."""
        columns = batch.answers.columns
        if columns is None:
            return self.any_labels
        own = columns.own.numpy()
        if not np.isin(own, self.window).all():
            self.window = self._window(own, batch.answers.coming)
        places = np.zeros(len(self.vocabulary), dtype=np.int64)
        places[self.window] = np.arange(len(self.window))
        return self.any_labels.at(batch.everywhere(places[own]))

    def _window(self, own: np.ndarray, coming: np.ndarray) -> np.ndarray:
        """Return columns of the vocabulary: all of `own`, then those of `coming` that fit."""
        listed = np.concatenate([own.ravel(), coming.ravel()])
        _, first = np.unique(listed, return_index=True)
        most = max(self.most, len(np.unique(own)))
        return listed[np.sort(first)[:most]]
