"""Batches: prompts of similar length, left-padded, as tensors on the model's devices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Bool, Int, Shaped

from ..errors import InputError
from ..prompts.sequences import Continued
from ..prompts.tokenizers import embedding_rows
from .everywhere import Everywhere

if TYPE_CHECKING:
    from ..models import Model
    from ..prompts import Prompts


@dataclass
class BatchAnswers:
    """Answers of a batch's prompts, of up to R tokens.

    Attributes
    ----------
    ids
        (B, label) tokens that the last position may predict.
    columns
        (B, label) index of these tokens in the readout's vocabulary; None if all prompts share
        them, in the readout's order.
    coming
        (n, label) the same of the prompts that come after the batch; empty if unknown.
    reads
        (B, R) columns of the positions that predict the answers' tokens.
    tokens
        (B, R, label) tokens to predict there, 0 where there is none.
    there
        (B, R, label) boolean: whether there is a token.
    alone
        Whether prompts have only one answer, whose rival is the whole vocabulary.
    continued
        Whether the prompts are followed by tokens of their answers.
    """

    ids: Everywhere
    columns: Everywhere | None
    coming: Int[np.ndarray, "n label"]
    reads: Everywhere
    tokens: Everywhere
    there: Everywhere
    alone: bool
    continued: bool

    @classmethod
    def of(
        cls,
        prompts: Prompts,
        rows: Int[np.ndarray, " B"],
        width: int,
        devices: Sequence[torch.device],
        following: Int[np.ndarray, " n"],
    ) -> BatchAnswers:
        """Return the answers of some prompts, padded to a width, and of those that follow."""
        answers = prompts.answers
        ids, columns = answers.first[rows], answers.columns
        target = ids[:, None]
        n_added = np.zeros(len(rows), dtype=np.int64)
        if isinstance(prompts, Continued):
            target, n_added = prompts.target[rows], prompts.n_added[rows]
            target = target[:, : int(n_added.max()) + 1]
        steps = np.arange(target.shape[1])
        reads = width - 1 - n_added[:, None] + np.minimum(steps, n_added[:, None])

        def on(array: np.ndarray) -> Everywhere:
            return Everywhere(array, devices)

        places = (on(reads), on(np.maximum(target, 0)), on(target >= 0))
        own = None if columns is None else on(columns[rows])
        coming = np.zeros((0, ids.shape[1]), dtype=np.int64)
        if columns is not None:
            coming = columns[following]
        return cls(on(ids), own, coming, *places, answers.alone, isinstance(prompts, Continued))

    @property
    def n_reads(self) -> int:
        """Number of positions R that are read."""
        return int(self.reads.own.shape[1])


@dataclass
class Batch:
    """Some prompts, left-padded to the length of the longest.

    Attributes
    ----------
    rows
        (B,) indices of the prompts.
    input_ids, attention_mask, position_ids
        (B, T) tensors on the embedding's device.
    devices
        All devices of the model.
    mask
        (B, T) boolean: True for tokens, False for padding.
    gold
        (B,) index of the right label.
    answers
        The answers to read.
    kept
        (B, K) columns of per-position results to keep, -1 where a prompt has fewer than K;
        None to keep all T.
    logits_to_keep
        Number of last positions to unembed; 0 for all.
    """

    rows: Int[np.ndarray, " B"]
    input_ids: Int[torch.Tensor, "B T"]
    attention_mask: Int[torch.Tensor, "B T"]
    position_ids: Int[torch.Tensor, "B T"]
    devices: list[torch.device]
    mask: Everywhere
    gold: Everywhere
    answers: BatchAnswers
    kept: Everywhere | None = None
    logits_to_keep: int = 1

    @property
    def width(self) -> int:
        """Number of positions T."""
        return int(self.input_ids.shape[1])

    @property
    def inputs(self) -> dict[str, torch.Tensor | bool | int]:
        """Arguments of the model's forward."""
        return {
            "input_ids": self.input_ids,
            "attention_mask": self.attention_mask,
            "position_ids": self.position_ids,
            "use_cache": False,
            "return_dict": True,
            "logits_to_keep": self.logits_to_keep,
        }

    def everywhere(self, values: np.ndarray) -> Everywhere:
        """Return an array on all devices of the model."""
        return Everywhere(values, self.devices)

    def cut(self, by_position: Shaped[np.ndarray, "prompt position"]) -> Everywhere:
        """Return the batch's part (B, T) of a (prompt, position) array, on all devices."""
        return self.everywhere(self.part(by_position))

    def part(self, by_position: Shaped[np.ndarray, "prompt position"]) -> Shaped[np.ndarray, "B T"]:
        """Return the batch's part (B, T) of a (prompt, position) array."""
        part: np.ndarray = by_position[self.rows][:, by_position.shape[1] - self.width :]
        return part


def make_batch(
    model: Model,
    prompts: Prompts,
    rows: Int[np.ndarray, " B"],
    columns: Int[np.ndarray, "prompt K"] | None = None,
    following: Sequence[int] | Int[np.ndarray, " n"] = (),
) -> Batch:
    """Return a batch of some prompts.

    Parameters
    ----------
    model
        Model, which determines the devices and the padding token.
    prompts
        All prompts.
    rows
        (B,) indices of the prompts in the batch.
    columns
        (prompt, K) columns of per-position results to keep (see `columns_of`); None for all.
    following
        (n,) indices of the prompts that are measured next.
    """
    width = int(prompts.lengths[rows].max())
    ids = prompts.token_id[rows][:, prompts.n_positions - width :]
    mask = ids >= 0
    # Padding is masked, so any token works if the model has no embedding of the padding token.
    pad = model.tokenizer.pad_token_id
    pad = 0 if pad is None or pad >= embedding_rows(model) else pad
    device, devices = model.device, model.devices
    answers = BatchAnswers.of(prompts, rows, width, devices, np.asarray(following, dtype=int))
    kept = None
    if columns is not None:
        cut = columns[rows] - (prompts.n_positions - width)
        kept = Everywhere(np.where(cut < 0, -1, cut), devices)
    return Batch(
        rows,
        torch.as_tensor(np.where(mask, ids, pad), device=device),
        torch.as_tensor(mask.astype(np.int64), device=device),
        torch.as_tensor(np.maximum(mask.cumsum(axis=1) - 1, 0), device=device),
        devices,
        Everywhere(mask, devices),
        Everywhere(prompts.gold_index[rows], devices),
        answers,
        kept,
        # Gemma 4 drops all other positions from the layers that share keys and values.
        0 if model.architecture.shared_keys else answers.n_reads,
    )


def columns_of(mask: Bool[np.ndarray, "prompt position"]) -> Int[np.ndarray, "prompt K"]:
    """Return (prompt, K) columns of selected positions, right-aligned, -1 where there are fewer.

    Parameters
    ----------
    mask
        (prompt, position) boolean: selected positions.
    """
    found = [np.flatnonzero(row) for row in mask]
    width = max(map(len, found))
    columns = np.full((len(mask), width), -1, dtype=np.int64)
    for i, row in enumerate(found):
        columns[i, width - len(row) :] = row
    return columns


def ordered(model: Model, prompts: Prompts, shared: bool = False) -> Int[np.ndarray, " prompt"]:
    """Return (prompt,) indices of the prompts in the order of batches, longest first.

    With `shared`, prompts with the same beginning come together. The longest prompts need most
    memory, so a run that does not fit fails early.

    Raises
    ------
    InputError
        If prompts are too long for the model.
    """
    if model.max_positions is not None and prompts.n_positions > model.max_positions:
        raise InputError(
            f"a prompt has {prompts.n_positions} tokens and the model takes {model.max_positions};"
            " take shorter prompts or fewer demonstrations"
        )
    lengths = prompts.lengths
    families = _families(prompts) if shared else np.arange(len(prompts))
    longest = np.zeros(len(prompts), dtype=np.int64)
    np.maximum.at(longest, families, lengths)
    return np.lexsort((-lengths, families, -longest[families]))


def _families(prompts: Prompts) -> Int[np.ndarray, " prompt"]:
    """Return (prompt,) numbers; equal numbers mark prompts that share a long beginning.

    In sorted order, a prompt joins its predecessor's family if they share half of its tokens.
    """
    tokens = [tuple(row[row >= 0]) for row in prompts.token_id]
    families = np.zeros(len(tokens), dtype=np.int64)
    before: tuple[int, ...] = ()
    family = -1
    for i in sorted(range(len(tokens)), key=tokens.__getitem__):
        pairs = zip(tokens[i], before, strict=False)
        common = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        if 2 * common < len(tokens[i]) or family < 0:
            family += 1
        families[i], before = family, tokens[i]
    return families
