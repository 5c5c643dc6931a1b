"""What heads write, whom they look at, and what they carry: attribution, QK and OV."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from ..errors import InputError
from ..intervention import check_heads
from .batch import Batch
from .collect import collect, dataset
from .measure import measure
from .readout import get_readout
from .recorders import Attribution, LabelValues, Similarity, TopTokens

if TYPE_CHECKING:
    import xarray as xr

    from ..head import Head
    from ..models import Model
    from ..prompts import Prompts


@measure
def attribution(
    model: Model,
    prompts: Prompts,
    norm: str = "frozen",
    *,
    batch_size: int | None = None,
    progress: bool | str = False,
) -> xr.Dataset:
    """How much each head's output, by itself, raises the labels at the last position.

    Parameters
    ----------
    model, prompts
        What is measured.
    norm
        "own": the final norm takes its statistics from the vector at hand. "frozen": it
        keeps those of the last position's final residual stream.
    batch_size
        Prompts in a batch; fewer where memory runs out. By default about a thousand
        tokens' worth on a processor, and as many as fill a GPU, which is found out and
        remembered.
    progress
        Show a bar; a text is its title.

    Returns
    -------
    xarray.Dataset
        logprob_increase (prompt, layer, head, label), in nat: log p(label given x + u) -
        log p(label given x), where x is the residual stream entering the layer and u the
        head's output (Yu & Ananiadou 2024). label_logit (prompt, layer, head, label).

    Raises
    ------
    InputError
        If `norm` is not known.
    """
    make = attribution_maker(model, prompts, norm)
    (arrays,) = collect(
        model,
        prompts,
        [make],
        batch_size=batch_size,
        kind=("attribution", norm),
        progress=progress,
    )
    return dataset("attribution", arrays, model, prompts, norm=norm)


def check_norm(norm: str) -> None:
    """Refuse a final norm that is neither of the two."""
    if norm not in ("own", "frozen"):
        raise InputError(f"norm={norm!r} is not known; use 'own' or 'frozen'")


def attribution_maker(
    model: Model, prompts: Prompts, norm: str = "frozen"
) -> Callable[[Batch], Attribution]:
    """What makes attribution's recorder for each batch."""
    check_norm(norm)
    readout = get_readout(model, prompts.label_ids)
    return lambda batch: Attribution(batch, readout, norm)


@measure
def qk_similarity(
    model: Model,
    prompts: Prompts,
    *,
    keep: str = "all",
    batch_size: int | None = None,
    progress: bool | str = False,
) -> xr.Dataset:
    """Similarity of the last position's query to every position's key.

    Parameters
    ----------
    model, prompts
        What is measured.
    keep
        "all" positions, or "labels": label positions alone, counted from the last of them;
        `token_position` says where each is.
    batch_size
        Prompts in a batch; fewer where memory runs out. By default about a thousand
        tokens' worth on a processor, and as many as fill a GPU, which is found out and
        remembered.
    progress
        Show a bar; a text is its title.

    Returns
    -------
    xarray.Dataset
        score, score_content, attention (prompt, layer, head, position), and for rotary
        models score_content_mean: the content part at the label positions' distances.
        NaN at padding.
    """
    make = similarity_maker(prompts)
    (arrays,) = collect(
        model, prompts, [make], batch_size=batch_size, keep=keep, kind="qk", progress=progress
    )
    return dataset("qk", arrays, model, prompts, keep=keep)


def similarity_maker(prompts: Prompts) -> Callable[[Batch], Similarity]:
    """What makes the QK recorder for each batch."""
    labels_at = prompts.where("labels")
    return lambda batch: Similarity(batch, batch.cut(labels_at))


@measure
def ov_labels(
    model: Model,
    prompts: Prompts,
    *,
    top_tokens: Sequence[Head] = (),
    keep: str = "all",
    batch_size: int | None = None,
    progress: bool | str = False,
) -> xr.Dataset:
    """What the value-output vector of every position says about the labels.

    Parameters
    ----------
    model, prompts
        What is measured.
    top_tokens
        Heads whose vectors are unembedded to the whole vocabulary, for the most likely
        token at each position.
    keep
        As in `qk_similarity`.
    batch_size
        Prompts in a batch; fewer where memory runs out. By default about a thousand
        tokens' worth on a processor, and as many as fill a GPU, which is found out and
        remembered.
    progress
        Show a bar; a text is its title.

    Returns
    -------
    xarray.Dataset
        label_logit (prompt, layer, head, position, label) of the raw vectors; attention
        times it is that of the weighted vectors. top_token (prompt, chosen, position),
        where `chosen` names heads as "layer.head". NaN or "" at padding.
    """
    readout = get_readout(model, prompts.label_ids)
    makers: list[Any] = [values_maker(model, prompts)]
    heads = check_heads(top_tokens, model)
    if heads:
        makers.append(lambda batch: TopTokens(batch, readout, heads))
    found = collect(
        model,
        prompts,
        makers,
        batch_size=batch_size,
        keep=keep,
        kind=("ov", len(heads)),
        progress=progress,
    )
    arrays = {name: array for result in found for name, array in result.items()}
    chosen = {"chosen": [str(h) for h in heads]} if heads else {}
    return dataset("ov", arrays, model, prompts, keep=keep, coordinates=chosen)


def values_maker(model: Model, prompts: Prompts) -> Callable[[Batch], LabelValues]:
    """What makes the OV recorder for each batch."""
    readout = get_readout(model, prompts.label_ids)
    return lambda batch: LabelValues(batch, readout)
