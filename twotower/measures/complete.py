"""Greedy completions of prompts, with edits of heads in force."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import nnsight
import torch
from transformers import GenerationConfig

from ..checks import shown, whole
from ..edits.edits import Add, Edit, KnockOut, as_edits
from ..edits.prepared_edits import AddVector, ChangeHeads, PreparedEdits
from ..errors import InputError
from ..models.measuring import measuring
from ..models.remote import reached
from ..models.wrapper import in_order
from ..options import option
from ..walk.batch import Batch
from ..walk.batch_size import Batches
from ..walk.padding import prove_padding
from ..walk.recorder import BatchEdit
from ..walk.walk import donors_of, walk
from .measurement import measurement

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

    Parameters
    ----------
    model, prompts
        Model and prompts to complete.
    max_tokens
        Largest number of tokens of a completion. It also ends at the model's end token.
    edits
        Edits that are active at every step: `KnockOut` and `Add`. A generated position is
        treated like the prompt's last one: "last" and "all" hold there too. References and
        donors give their output at their last position.
    stop
        Text at which completions are cut, such as a line break; the text itself is left out.

    Returns
    -------
    list of str
        The texts that follow the prompts, as `trace_effects` takes them.

    Raises
    ------
    InputError
        If an edit is not one of heads' outputs, or prompts and completions are too long for the
        model.
    """
    whole("max_tokens", max_tokens, 1)
    if stop is not None and (not isinstance(stop, str) or not stop):
        raise InputError(f"stop={shown(stop)} must be a text")
    listed = as_edits(edits)
    for edit in listed:
        if not isinstance(edit, (KnockOut, Add)):
            raise InputError(
                f"complete() takes edits of heads' outputs and Add, not {type(edit).__name__}, "
                "which has no keys for generated tokens"
            )
    longest = prompts.n_positions + max_tokens
    if model.max_positions is not None and longest > model.max_positions:
        raise InputError(
            f"prompts of {prompts.n_positions} tokens with max_tokens={max_tokens} do not fit into "
            f"the model's {model.max_positions}; use a smaller max_tokens"
        )
    texts = [""] * len(prompts)
    settings = _settings(model, max_tokens)
    with measuring(model):
        prepared = PreparedEdits(model, prompts, listed)
        feed = Batches(model, prompts, option("batch_size"), kind="complete")
        for batch in feed:
            with feed.attempt():
                if option("proof"):
                    prove_padding(model, prompts, batch)
                ready = prepared.for_batch(batch)
                with warnings.catch_warnings():
                    # nnsight warns where a loop over the steps ends with the generation.
                    warnings.filterwarnings("ignore", message=".*was never reached")
                    found = _generate(model, batch, ready, settings)
                for row, ids in zip(batch.rows, found.tolist(), strict=True):
                    texts[row] = _text(model, ids, settings, stop)
    return texts


def _settings(model: Model, max_tokens: int) -> GenerationConfig:
    """Return the settings of greedy decoding; penalties of the checkpoint do not apply."""
    own = getattr(model.module, "generation_config", None)
    end = getattr(own, "eos_token_id", None) or model.config.eos_token_id
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
) -> torch.Tensor:
    """Return the generated tokens (B, tokens) of a batch."""
    architecture, root = model.architecture, model.traced
    changes = [edit for edit in edits if isinstance(edit, ChangeHeads)]
    vectors = [edit for edit in edits if isinstance(edit, AddVector)]
    layers = sorted({*(x.index for x in vectors), *(n for x in changes for n in x.heads)})
    where = {"remote": model.remote} if model.remote else {}
    inputs: dict[str, Any] = {
        "input_ids": batch.input_ids,
        "attention_mask": batch.attention_mask,
        "generation_config": settings,
    }
    before = [(x.batch.inputs, x.batch.mask, [x.recorder]) for x in donors_of(edits, [])]
    with in_order(model.name), reached(model.remote), root.session(**where):
        with torch.no_grad():
            for their_inputs, their_mask, recorder in before:
                with root.trace(**their_inputs):
                    walk(architecture, root, their_mask, recorder)
        with torch.no_grad(), root.generate(**inputs) as tracer:
            chosen = nnsight.save([])
            for step in tracer.iter[:]:
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
    return torch.stack([tokens.cpu() for tokens in chosen], dim=1)


def _text(model: Model, ids: list[int], settings: GenerationConfig, stop: str | None) -> str:
    """Return the text of tokens up to the end token."""
    ends = (
        settings.eos_token_id
        if isinstance(settings.eos_token_id, list)
        else [settings.eos_token_id]
    )
    length = next((i for i, token in enumerate(ids) if token in ends), len(ids))
    text: str = model.tokenizer.decode(
        ids[:length], skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
    return text if stop is None else text.split(stop)[0]
