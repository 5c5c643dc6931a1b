"""The weights of a planted model."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch

from .coordinates import Coordinates, directions
from .families import FAMILIES, LEARNED, Family, HeadWeights, empty_model
from .mechanism import PLACES, RECENT, Mechanism

if TYPE_CHECKING:
    from ..head import Head
    from .planting import Planting

N_POSITIONS = 256


def build(planting: Planting) -> Any:
    """Make a transformers model with the planting's weights."""
    family = FAMILIES[planting.architecture]
    n, heads = planting.n_classes, planting.n_heads
    d_model = heads * planting.d_head
    names = directions(n, len(LEARNED) if family.learned_positions else 0)
    x = Coordinates(names, d_model)
    tokens = planting.tokenizer().get_vocab()
    kv = heads // 2 if family.grouped and heads % 2 == 0 else heads
    model = start(family, tokens, d_model, planting.n_layers, heads, kv)
    after = family.norms_after
    slots = family.slots(planting.d_head)
    mechanism = Mechanism(x, slots, n, planting.d_head, planting.similarity, planting.recency)
    base = getattr(model, family.base)
    with torch.no_grad():
        _write_embeddings(model, base, planting, tokens, x)
        for number, layer in enumerate(getattr(base, family.layers)):
            attention = getattr(layer, family.attention)
            family.write(attention, _heads(planting, mechanism, number), kv)
            if after is not None:
                assert slots.spare is not None
                unused = x["constant"].nonzero().flatten()
                after.write(layer, unused, slots.spare, planting.d_head, planting.noise)
        add_noise(getattr(base, family.layers), planting.noise, planting.seed, d_model)
    return model


def start(
    family: Family, tokens: dict[str, int], d_model: int, n_layers: int, n_heads: int, kv: int
) -> Any:
    """Make a model of a family in which nothing is planted yet."""
    config = family.config(
        d_model,
        n_layers,
        n_heads,
        kv,
        vocab_size=len(tokens),
        max_position_embeddings=N_POSITIONS,
        pad_token_id=tokens["<pad>"],
        eos_token_id=tokens["<pad>"],
        bos_token_id=None,
    )
    after = family.norms_after
    return empty_model(config, 1.0 if after is None else after.one)


def _write_embeddings(
    model: Any, base: Any, planting: Planting, tokens: dict[str, int], x: Coordinates
) -> None:
    family = FAMILIES[planting.architecture]
    table = getattr(base, family.embedding).weight
    table[:] = math.sqrt(x.d_model) * x["constant"]
    table[tokens[":"]] += x["asks"]
    unembedding = model.get_output_embeddings().weight
    # The answer when no label is found; otherwise all logits would be rounding errors.
    unembedding[tokens["<unk>"]] = x["constant"] / math.sqrt(x.d_model)
    for c, (texts, label) in enumerate(
        zip(planting.task.texts.values(), planting.labels, strict=True)
    ):
        for text in texts:
            table[tokens[text]] += x["text"] + x[f"feature {c}"]
        table[tokens[f" {label}"]] += x["label"] + x["asks"] + x[f"label {c}"]
        unembedding[tokens[f" {label}"]] = x[f"answer {c}"]
    if family.scaled_embedding:
        table /= math.sqrt(x.d_model)
    if family.learned_positions:
        learned = getattr(base, family.learned_positions).weight
        write_waves(learned, x)
        for place in range(len(learned)):
            learned[place] += place / PLACES * x["place"]


def write_waves(learned: Any, x: Coordinates) -> None:
    """Write waves of several frequencies into learned positions."""
    for place in range(len(learned)):
        for f, theta in enumerate(LEARNED):
            learned[place] += math.cos(theta * place) * x[f"cos {f}"]
            learned[place] += math.sin(theta * place) * x[f"sin {f}"]


def _heads(planting: Planting, mechanism: Mechanism, layer: int) -> list[HeadWeights]:
    """Return the weights of all heads of a layer."""
    kinds: dict[Head, str] = {planting.gather: "gather"}
    kinds |= dict.fromkeys(planting.match, "match")
    for kind, heads in planting.distractors.items():
        kinds |= dict.fromkeys((type(planting.gather)(*head) for head in heads), kind)
    found = []
    for number in range(planting.n_heads):
        kind = kinds.get(type(planting.gather)(layer, number), "none")
        q, o = _queries_and_outputs(planting, mechanism, kind)
        found.append(HeadWeights(q, mechanism.keys(), mechanism.values(), o))
    return found


def _queries_and_outputs(
    planting: Planting, mechanism: Mechanism, kind: str
) -> tuple[torch.Tensor, torch.Tensor]:
    q = torch.zeros(mechanism.d_head, mechanism.x.d_model)
    o = q.T.clone()
    small = mechanism.label_outputs(planting.distractor_gain)
    if kind == "gather":
        return mechanism.gathering_queries(), mechanism.gathering_outputs()
    if kind == "match":
        gain = planting.gain / len(planting.match)
        return mechanism.matching_queries(), mechanism.label_outputs(gain)
    if kind == "silent":
        return mechanism.matching_queries(), o
    if kind == "loud":
        return mechanism.looking_queries(0.0, 0.0), small
    if kind == "recent":
        return mechanism.looking_queries(0.0, RECENT), small
    return q, o


def add_noise(layers: Any, noise: float, seed: int, d_model: int) -> None:
    """Add noise to every matrix of attention and MLP."""
    if not noise:
        return
    generator = torch.Generator().manual_seed(seed)
    for parameter in layers.parameters():
        if parameter.dim() == 2:
            drawn = torch.randn(parameter.shape, generator=generator)
            parameter += noise / math.sqrt(d_model) * drawn
