"""Random sequences of tokens, repeated: what head detectors look at."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ..checks import whole
from ..errors import InputError
from ..results.provenance import tokenizer_hash
from .answers import Answers
from .pieces import token_texts
from .prompts import Prompts
from .segments import Prompt, Segment

if TYPE_CHECKING:
    from .model import LoadedModel


def random_repeats(model: LoadedModel, n: int, length: int, seed: int = 0) -> Prompts:
    """Return sequences of random tokens, each repeated once (Olsson et al. 2022).

    Parameters
    ----------
    model
        Model that gives the tokenizer.
    n, length
        Number of sequences, and of different tokens in each.
    seed
        Seed of the draw.

    Returns
    -------
    Prompts
        Of the BOS token, if the tokenizer has one, and 2 x `length` tokens less the last one,
        which is the right answer. First occurrences have the role "text", the repetition the
        role "label". They are token ids: their text may be tokenized otherwise.

    Raises
    ------
    InputError
        If the vocabulary has too few ordinary tokens, or the model's context is too short.
    """
    whole("n", n, 1)
    whole("length", length, 2)
    tokenizer = model.tokenizer
    usual = _ordinary(tokenizer)
    if len(usual) < length:
        raise InputError(f"the tokenizer has {len(usual)} ordinary tokens, fewer than {length}")
    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    width = len(start) + 2 * length - 1
    if model.max_positions is not None and width > model.max_positions:
        raise InputError(
            f"{width} tokens do not fit into the model's {model.max_positions}; "
            "use a smaller length"
        )
    rng = np.random.default_rng([seed, 31])
    drawn = np.stack([rng.permutation(usual)[:length] for _ in range(n)])
    token_id = np.concatenate(
        [np.broadcast_to(np.array(start, dtype=np.int64), (n, len(start))), drawn, drawn[:, :-1]],
        axis=1,
    )
    roles = ["bos"] * len(start) + ["text"] * length + ["label"] * (length - 1)
    roles[-1] = "last"
    texts = [token_texts(tokenizer, row) for row in token_id]
    items = [Prompt((Segment("".join(row), "text"),), "".join(row), "right", "") for row in texts]
    shape = token_id.shape

    def filled(value: Any, kind: Any = object) -> np.ndarray:
        return np.full(shape, value, dtype=kind)

    answers = drawn[:, -1][:, None, None]
    right = np.array([token_texts(tokenizer, row[0]) for row in answers], dtype=object)
    return Prompts(
        tuple(items),
        ("right",),
        Answers(right, answers, "first", by_prompt=True),
        token_id=token_id,
        token=np.array(texts, dtype=object),
        role=np.broadcast_to(np.array(roles, dtype=object), shape).copy(),
        demonstration=filled(-1, np.int64),
        demonstration_class=filled(""),
        label_text=filled(""),
        tokenizer=tokenizer,
        tokenizer_hash=tokenizer_hash(tokenizer),
        task_name="random repeats",
        seed=seed,
    )


def _ordinary(tokenizer: Any) -> np.ndarray:
    """Return the tokens that are neither special nor added, and have visible characters."""
    added = set(tokenizer.added_tokens_decoder)
    return np.array(
        [
            token
            for token in range(tokenizer.vocab_size)
            if token not in added and tokenizer.decode([token]).strip(" \ufffd")
        ],
        dtype=np.int64,
    )
