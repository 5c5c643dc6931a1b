"""Greedy completions of prompts, with edits of heads in force."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import nnsight
import numpy as np
import torch
from transformers import GenerationConfig

from ..checks import shown, whole
from ..edits.changes import From, Resample
from ..edits.edits import Add, Edit, KnockOut, as_edits
from ..edits.prepared_edits import AddVector, ChangeHeads, PreparedEdits
from ..errors import InputError, ModelError
from ..models.measuring import measuring
from ..models.remote import reached
from ..models.wrapper import in_order
from ..options import option
from ..prompts.characters import BROKEN
from ..walk.batch import Batch
from ..walk.batch_size import Batches
from ..walk.padding import prove_padding
from ..walk.recorder import BatchEdit
from .completed import prove_completions
from .measurement import measurement
from .stepwise import step_by_step

if TYPE_CHECKING:
    from ..models import Model
    from ..prompts import Prompts


@measurement
def complete(
    model: Model,
    prompts: Prompts,
    max_tokens: int = 32,
    edits: Edit | Sequence[Edit] = (),
    *,
    stop: str | None = None,
) -> list[str]:
    """Return the model's greedy completions of prompts.

    Each token is the one with the largest logit; the checkpoint's own settings of generation, such
    as a penalty on repetition, are not used.

    Parameters
    ----------
    model, prompts
        Model and prompts to complete.
    max_tokens
        Largest number of tokens of a completion. It also ends at the model's end token.
    edits
        Edits that are active at every step. A generated position is treated like the prompt's
        last one: "last" and "all" hold there too, references give their mean at their last
        position, and the same tokens follow donors. `Add` and `KnockOut` without donors act
        while the model generates; with any other, each token takes a forward of the whole text.
    stop
        Text at which completions are cut, such as a line break; the text itself is left out.

    Returns
    -------
    list of str
        The texts that follow the prompts, as `trace_effects` takes them. Control tokens that the
        model generates before its end stay in them; a last character that `max_tokens` cuts in
        two is left out. A prompt is "" if its logits are not finite. Bytes inside that are no
        character become U+FFFD, which `trace_effects` refuses.

    Raises
    ------
    InputError
        If an edit does not fit the model or the prompts, or prompts and completions are too long
        for the model.
    ModelError
        If the model generates other tokens than those with the largest logits.
    CheckError
        If a forward without a cache gives other tokens.
    """
    whole("max_tokens", max_tokens, 1)
    if stop is not None and (not isinstance(stop, str) or not stop):
        raise InputError(f"stop={shown(stop)} must be a text")
    listed = as_edits(edits)
    longest = prompts.n_positions + max_tokens
    if model.max_positions is not None and longest > model.max_positions:
        raise InputError(
            f"prompts of {prompts.n_positions} tokens with max_tokens={max_tokens} do not fit into "
            f"the model's {model.max_positions}; use a smaller max_tokens"
        )
    settings = _settings(model, max_tokens)
    ends = _ends(settings)
    if all(map(_while_generating, listed)):
        found = _generated(model, prompts, listed, settings)
    else:
        found = step_by_step(model, prompts, max_tokens, listed, ends)
    finite = np.ones(len(prompts), dtype=bool)
    if option("proof"):
        finite = prove_completions(model, prompts, found, listed)
    texts = []
    for ids, all_ids, whole_run in zip(found, prompts.token_id, finite, strict=True):
        before = all_ids[all_ids >= 0].tolist()
        text = _text(model.tokenizer, before, ids, ends) if whole_run else ""
        texts.append(text if stop is None else text.split(stop)[0])
    return texts


def _while_generating(edit: Edit) -> bool:
    """Return whether an edit can act while the model generates, with its cache."""
    if isinstance(edit, KnockOut):
        return not isinstance(edit.to, (From, Resample))
    return isinstance(edit, Add)


def _generated(
    model: Model, prompts: Prompts, edits: Sequence[Edit], settings: GenerationConfig
) -> list[list[int]]:
    """Return the tokens that the model generates after each prompt, with the end token."""
    found: list[list[int]] = [[]] * len(prompts)
    with measuring(model), _own_settings(model, settings):
        prepared = PreparedEdits(model, prompts, edits)
        feed = Batches(model, prompts, option("batch_size"), kind="complete")
        for batch in feed:
            with feed.attempt():
                if option("proof"):
                    prove_padding(model, prompts, batch)
                ready = prepared.for_batch(batch)
                with warnings.catch_warnings():
                    # nnsight warns where a loop over the steps ends with the generation.
                    warnings.filterwarnings("ignore", message=".*was never reached")
                    chosen, fed = _generate(model, batch, ready, settings)
                for row, ids, given in zip(batch.rows, chosen, fed, strict=True):
                    found[row] = _until_end(ids, settings)
                    if given[: len(found[row]) - 1] != found[row][:-1]:
                        raise ModelError(
                            f"{model.name}, prompt {row}: generation goes on with other tokens "
                            "than those with the largest logits, so it is not greedy; look at the "
                            "model's generation_config"
                        )
    return found


@contextmanager
def _own_settings(model: Model, settings: GenerationConfig) -> Iterator[None]:
    """Replace the model's settings of generation, which fill those that are not given."""
    known = None if model.remote else getattr(model.module, "generation_config", None)
    if known is None:
        yield
        return
    model.module.generation_config = settings
    try:
        yield
    finally:
        model.module.generation_config = known


def _settings(model: Model, max_tokens: int) -> GenerationConfig:
    """Return the settings of greedy decoding, with the model's end tokens."""
    own = getattr(model.module, "generation_config", None)
    end = getattr(own, "eos_token_id", None)
    end = model.config.eos_token_id if end is None else end
    pad = model.tokenizer.pad_token_id
    first_end = end[0] if isinstance(end, list) else end
    return GenerationConfig(
        max_new_tokens=max_tokens,
        do_sample=False,
        num_beams=1,
        eos_token_id=end,
        pad_token_id=first_end if pad is None else pad,
    )


def _generate(
    model: Model, batch: Batch, edits: Sequence[BatchEdit], settings: GenerationConfig
) -> tuple[list[list[int]], list[list[int]]]:
    """Return the tokens with the largest logits by prompt, and those with which it goes on."""
    architecture, root = model.architecture, model.traced
    changes = [edit for edit in edits if isinstance(edit, ChangeHeads)]
    vectors = [edit for edit in edits if isinstance(edit, AddVector)]
    layers = sorted({*(x.index for x in vectors), *(n for x in changes for n in x.heads)})
    inputs: dict[str, Any] = {
        "input_ids": batch.input_ids,
        "attention_mask": batch.attention_mask,
        "generation_config": settings,
    }
    name, remote = model.name, model.remote
    if remote:
        inputs["remote"] = remote
    with in_order(name), reached(remote), torch.no_grad(), root.generate(**inputs) as tracer:
        chosen, fed = nnsight.save([]), nnsight.save([])
        for step in tracer.iter[:]:
            if step > 0:
                fed.append(root.inputs[1]["input_ids"][:, -1])
            blocks = architecture.layers(root)
            for layer in layers:
                entered = residual = blocks[layer].input
                for vector in vectors:
                    residual = vector.enter(layer, residual, last=step > 0)
                if residual is not entered:
                    blocks[layer].input = residual
                if not any(layer in edit.heads for edit in changes):
                    continue
                projection = architecture.projection(blocks[layer])
                z = projection.input.unflatten(-1, (architecture.heads_in(layer), -1))
                for edit in changes:
                    z = edit.changed(layer, z, last=step > 0)
                projection.input = z.flatten(-2)
            chosen.append(architecture.unembedding(root).output[:, -1].argmax(dim=-1))
    n = len(batch.rows)
    return _by_prompt(chosen, n), _by_prompt(fed, n)


def _by_prompt(steps: Sequence[torch.Tensor], n: int) -> list[list[int]]:
    """Return the tokens of each of n prompts, from those of each step."""
    return [list(ids) for ids in zip(*(x.tolist() for x in steps), strict=True)] or [[]] * n


def _ends(settings: GenerationConfig) -> list[int | None]:
    """Return the end tokens."""
    known = settings.eos_token_id
    return known if isinstance(known, list) else [known]


def _until_end(ids: list[int], settings: GenerationConfig) -> list[int]:
    """Return the tokens up to the first end token, with it."""
    ends = _ends(settings)
    length = next((i for i, token in enumerate(ids, start=1) if token in ends), len(ids))
    return ids[:length]


def _text(tokenizer: Any, before: list[int], ids: list[int], ends: Sequence[int | None]) -> str:
    """Return the text of tokens after those of the prompt, without an end token.

    Some tokenizers leave out a space at the beginning of a text; here it is not the beginning.
    Where generation was cut, up to three bytes of a character are left out at the end; some
    tokenizers show each of them.
    """
    ended = ids[-1] in ends
    ids = ids[:-1] if ended else ids
    start, whole, alone = (
        tokenizer.decode(some, clean_up_tokenization_spaces=False)
        for some in (before, before + ids, ids)
    )
    text = str(whole.removeprefix(start) if whole.startswith(start) else alone)
    for _ in range(0 if ended else 3):
        text = text.removesuffix(BROKEN)
    return text
