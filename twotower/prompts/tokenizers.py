"""Check that prompts fit a model: the same tokens, and an embedding for each."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import numpy as np

from ..errors import InputError
from ..results.provenance import tokenizer_hash
from .answers import read_answers
from .tokens import encode

if TYPE_CHECKING:
    from .model import LoadedModel
    from .prompts import Prompts

_MADE = "the prompts were made with another tokenizer, or with this one before it was changed"

_accepted: WeakKeyDictionary[Prompts, set[str]] = WeakKeyDictionary()
"""Hashes of the tokenizers that give the same tokens, by prompts object."""


def check_prompts(model: LoadedModel, prompts: Prompts) -> None:
    """Check that a model reads the same tokens in prompts.

    Takes a fraction of a millisecond if the model's tokenizer made the prompts, and was not
    changed since.

    Parameters
    ----------
    model
        The model to measure.
    prompts
        Prompts, reference prompts or donors.

    Raises
    ------
    InputError
        If the model's tokenizer gives other tokens for the same texts, or the model has no
        embedding for a token.
    """
    if not len(prompts):
        raise InputError("there are no prompts: what was given is empty")
    ours = tokenizer_hash(model.tokenizer)
    if prompts.tokenizer is not model.tokenizer or ours != prompts.tokenizer_hash:
        _check_tokens(model.tokenizer, prompts, ours)
    _check_sizes(model, prompts)


def embedding_rows(model: LoadedModel) -> int:
    """Return the number of rows of a model's embedding."""
    return _rows(model.module.get_input_embeddings(), model.config)


def _check_tokens(tokenizer: Any, prompts: Prompts, ours: str) -> None:
    if (ours and ours == prompts.tokenizer_hash) or ours in _accepted.get(prompts, ()):
        return
    known = [ids[ids >= 0].tolist() for ids in prompts.token_id]
    for number, (made, again) in enumerate(
        zip(known, encode(prompts.strings, tokenizer, prompts.add_special_tokens), strict=True)
    ):
        if made != again:
            raise InputError(_difference(number, made, again, prompts, tokenizer))
    try:
        found = read_answers(
            prompts.items,
            prompts.labels,
            tokenizer,
            known,
            scoring=prompts.answers.scoring,
            add_special_tokens=prompts.add_special_tokens,
            control_tokens=True,
        )
    except InputError as error:
        raise InputError(f"{_MADE}: {error}") from error
    both = (prompts.answers.token_id, found.token_id)
    if not np.array_equal(*both):
        raise InputError(_other_answer(prompts, *both))
    if ours:
        _accepted.setdefault(prompts, set()).add(ours)


def _other_answer(prompts: Prompts, made: np.ndarray, again: np.ndarray) -> str:
    """Describe the first different answer in a sentence."""
    for text, *both in zip(
        prompts.answers.text.ravel(),
        *(ids.reshape(-1, ids.shape[2]) for ids in (made, again)),
        strict=True,
    ):
        old, new = (ids[ids >= 0].tolist() for ids in both)
        if old != new:
            return (
                f"{_MADE}: the tokens of {text!r} have the "
                f"ids {old} there and {new} with this model; build the prompts with this model"
            )
    raise AssertionError("the answers do not differ")


def _difference(
    number: int, made: list[int], again: list[int], prompts: Prompts, tokenizer: Any
) -> str:
    """Describe the first different token in a sentence."""
    pairs = zip(made, again, strict=False)
    place = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(made), len(again)))
    sides = []
    for ids, maker in ((made, prompts.tokenizer), (again, tokenizer)):
        token = ids[place] if place < len(ids) else None
        text = "missing" if token is None else f"{maker.decode([token])!r} (id {token})"
        sides.append(text)
    return (
        f"{_MADE}: token {place} of prompt {number} is "
        f"{sides[0]} there and {sides[1]} with this model; build the prompts with this model"
    )


def _check_sizes(model: LoadedModel, prompts: Prompts) -> None:
    """Check that the embedding has all token ids, and the unembedding all ids of answers."""
    rows = embedding_rows(model)
    top = int(prompts.token_id.max())
    if top >= rows:
        raise InputError(_beyond("token", top, rows, "embedding", prompts))
    check_tokens(model, prompts, int(prompts.answers.token_id.max()))


def check_tokens(model: LoadedModel, prompts: Prompts, top: int) -> None:
    """Check that the unembedding has a token of an answer.

    Parameters
    ----------
    model, prompts
        The model, and the prompts that the message's token belongs to.
    top
        The largest token id.

    Raises
    ------
    InputError
        If it has no such token.
    """
    rows = _rows(model.architecture.unembedding(model.module), model.config)
    if top >= rows:
        raise InputError(_beyond("answer's token", top, rows, "unembedding", prompts))


def _beyond(what: str, token: int, rows: int, where: str, prompts: Prompts) -> str:
    text = prompts.tokenizer.convert_ids_to_tokens(token)
    return (
        f"the {what} {text!r} has the id {token} and the model's {where} has {rows} rows; resize "
        "it (model.resize_token_embeddings(len(tokenizer)) on the transformers model, then load "
        "it again), or remove the token"
    )


def _rows(part: Any, config: Any) -> int:
    """Return the rows of an embedding or unembedding, also if packed (quantized) or wrapped."""
    while hasattr(part, "base_layer"):
        part = part.base_layer
    for name in ("num_embeddings", "out_features"):
        size = getattr(part, name, None)
        if isinstance(size, int):
            return size
    weight = getattr(part, "weight", None)
    return int(config.vocab_size if weight is None else weight.shape[0])
