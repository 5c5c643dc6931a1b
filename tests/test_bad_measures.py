"""Wrong edits, and wrong arguments of measures: one clear error each."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from bad_input import INPUT, refused
from surface import under
from tiny import TWO

import twotower as tt
from twotower.measures.agreement import agreement
from twotower.measures.bias import bias_reduction, recent_label
from twotower.measures.group_effects import strongest_group, subset_effects

HEADS = [(0, 0)]


@pytest.fixture(scope="module")
def given(llama: tt.Model) -> SimpleNamespace:
    prompts = tt.build_prompts(llama, TWO, shots=1, n=4)
    effects, answers = tt.head_effects(llama, prompts), tt.predict(llama, prompts)
    bias = tt.label_bias(answers, ["foo"] * 4)
    of = (llama, prompts)
    return SimpleNamespace(of=of, prompts=prompts, effects=effects, answers=answers, bias=bias)


def predict(given: SimpleNamespace, edits: Any) -> Any:
    return tt.predict(*given.of, edits)


def groups(given: SimpleNamespace, groups: Any, **options: Any) -> Any:
    return tt.group_effects(*given.of, groups, **options)


def effects(given: SimpleNamespace, **options: Any) -> Any:
    return under(tt.head_effects, *given.of, **options)


def knocked(given: SimpleNamespace, heads: Any, positions: Any = "all") -> Any:
    return predict(given, tt.KnockOut(heads, positions))


EDITS = {
    "no such layer": (lambda g: knocked(g, [(9, 0)]), INPUT, "head 9.0 is out of range"),
    "no such head": (lambda g: knocked(g, [(0, -1)]), INPUT, "head 0.-1 is out of range"),
    "a head twice": (lambda g: knocked(g, HEADS * 2), INPUT, "head 0.0 is given twice"),
    "half a head": (lambda g: knocked(g, [(0,)]), INPUT, "is not a head"),
    "a pair for a list": (lambda g: knocked(g, (0, 1)), INPUT, "0 is not a head"),
    "a text for heads": (lambda g: knocked(g, "01"), INPUT, "heads='01' must be a list"),
    "nowhere": (lambda g: knocked(g, HEADS, "here"), INPUT, "positions='here' is not known"),
    "no positions": (lambda g: knocked(g, HEADS, None), INPUT, "positions must be"),
    "a small mask": (
        lambda g: knocked(g, HEADS, np.zeros((2, 2), bool)),
        INPUT,
        "a boolean array of shape",
    ),
    "at no label": (lambda g: knocked(g, HEADS, tt.at(label="z")), INPUT, "has the label 'z'"),
    "at no class": (
        lambda g: knocked(g, HEADS, tt.at(demonstration_class="z")),
        INPUT,
        "has the demonstration class 'z'",
    ),
    "at no demonstration": (
        lambda g: knocked(g, HEADS, tt.at(demonstration=9)),
        INPUT,
        "has the demonstration 9",
    ),
    "a change by name": (lambda g: tt.KnockOut(HEADS, to="x"), INPUT, "to='x' is not a change"),
    "a mean of nothing": (
        lambda g: tt.Mean(None),
        INPUT,
        "reference must be the result of build_prompts",
    ),
    "factor nan": (
        lambda g: tt.KnockOut(HEADS, "all", to=tt.Times(np.nan)),
        INPUT,
        "factor=nan must be a finite",
    ),
    "factor text": (
        lambda g: tt.KnockOut(HEADS, "all", to=tt.Times("2")),
        INPUT,
        "factor='2' must be a finite",
    ),
    "weights below 0": (lambda g: tt.ScaleAttention(HEADS, -1, "all"), INPUT, "0 or more"),
    "renormalize": (
        lambda g: tt.ScaleAttention(HEADS, 2, "all", renormalize="no"),
        INPUT,
        "renormalize='no' must be True or False",
    ),
    "keys nowhere": (
        lambda g: predict(g, tt.ScaleAttention(HEADS, 2, "here")),
        INPUT,
        "positions='here' is not known",
    ),
    "distance": (lambda g: tt.DropPosition(HEADS, distance="far"), INPUT, "distance='far'"),
    "no donor": (
        lambda g: tt.KnockOut(HEADS, "last", to=tt.From(None)),
        INPUT,
        "donor must be the result of build_prompts",
    ),
    "what": (lambda g: tt.Patch(HEADS, g.prompts, what="q"), INPUT, "what='q' is not known"),
    "donors": (
        lambda g: predict(g, tt.KnockOut(HEADS, "last", to=tt.From(g.prompts[:2]))),
        INPUT,
        "2 donors for 4",
    ),
    "an edit's name": (lambda g: predict(g, ["KnockOut"]), INPUT, "'KnockOut' is not an edit"),
}

MEASURES = {
    "logprobs": (lambda g: effects(g, logprobs="no"), INPUT, "logprobs='no' must be True or"),
    "a budget": (lambda g: effects(g, memory_budget="lots"), INPUT, "memory_budget='lots' must"),
    "a change": (lambda g: effects(g, to="x"), INPUT, "to='x' is not a change"),
    "a sweep nowhere": (lambda g: effects(g, positions="x"), INPUT, "positions='x' is not known"),
    "a reference": (
        lambda g: effects(g, to=tt.From(3)),
        INPUT,
        "donor must be the result of build_prompts",
    ),
    "an empty mask": (
        lambda g: effects(g, positions=np.zeros(g.prompts.token_id.shape, bool)),
        INPUT,
        "nothing would be changed",
    ),
    "a run's logprobs": (lambda g: tt.analyze(*g.of, logprobs="no"), INPUT, "logprobs='no' must"),
    "a measure": (lambda g: tt.analyze(*g.of, measures=["z"]), INPUT, "choose a list from"),
    "no measures": (lambda g: tt.analyze(*g.of, measures=[]), INPUT, "choose a list from"),
    "a run kept": (lambda g: tt.analyze(*g.of, keep="some"), INPUT, "keep='some' is not known"),
    "gradients": (lambda g: tt.attribution_patching(*g.of, "x"), INPUT, "positions='x' is not"),
    "donors of gradients": (
        lambda g: tt.attribution_patching(*g.of, to=tt.From(g.prompts[:1])),
        INPUT,
        "donors for",
    ),
    "shares": (
        lambda g: tt.measures.shares.attention_shares(*g.of, None),
        INPUT,
        "positions must be",
    ),
    "norm": (lambda g: tt.attribution(*g.of, ["own"]), INPUT, r"norm=\['own'\] is not known"),
    "tracing": (lambda g: tt.causal_tracing(*g.of, g.prompts[:1]), INPUT, "donors for 1 prompts"),
    "top tokens": (lambda g: tt.ov_labels(*g.of, top_tokens=3), INPUT, "heads=3 must be a list"),
    "labels kept": (lambda g: tt.ov_labels(*g.of, keep="x"), INPUT, "keep='x' is not known"),
    "similarity kept": (lambda g: tt.qk_similarity(*g.of, keep="x"), INPUT, "keep='x' is not"),
    "streams": (
        lambda g: tt.measures.residual.residual_streams(None, g.prompts),
        INPUT,
        "model must be the result of load",
    ),
    "no greedy heads": (lambda g: tt.greedy_heads(*g.of, 0), INPUT, "k=0 must be"),
    "greedy's pool": (lambda g: tt.greedy_heads(*g.of, 1, pool="x"), INPUT, "heads='x' must be"),
    "groups none": (lambda g: groups(g, None), INPUT, "groups=None must be a list of groups"),
    "groups a text": (lambda g: groups(g, "ab"), INPUT, "groups='ab' must be a list of groups"),
    "groups of numbers": (lambda g: groups(g, [3]), INPUT, "heads=3 must be a list"),
    "no groups": (lambda g: groups(g, []), INPUT, "there are no groups"),
    "an empty group": (lambda g: groups(g, [[]]), INPUT, "a group is empty"),
    "a group twice": (lambda g: groups(g, [HEADS, HEADS]), INPUT, "group 0.0 is given twice"),
    "groups' logprobs": (lambda g: groups(g, [HEADS], logprobs=1), INPUT, "logprobs=1 must be"),
    "pairs": (
        lambda g: under(tt.pair_effects, *g.of, memory_budget=0),
        INPUT,
        "memory_budget=0 must",
    ),
    "an empty pool": (
        lambda g: subset_effects(*g.of, []),
        INPUT,
        "give 1 to 12 heads",
    ),
    "no pool": (
        lambda g: subset_effects(*g.of, None),
        INPUT,
        "heads=None must be a list",
    ),
    "the strongest head": (
        lambda g: strongest_group(g.effects, 2),
        INPUT,
        "needs the result of group_",
    ),
    "the strongest of none": (
        lambda g: strongest_group(None, 2),
        INPUT,
        "needs the result of group_",
    ),
    "no strongest": (
        lambda g: strongest_group(groups(g, [HEADS]), 0),
        INPUT,
        "k=0 must be a whole number",
    ),
    "a strongest too large": (
        lambda g: strongest_group(groups(g, [HEADS]), 5),
        INPUT,
        "no group has 5 heads",
    ),
    "agreement with none": (
        lambda g: agreement(g.effects, None),
        INPUT,
        "agreement needs the result of",
    ),
    "agreement with answers": (
        lambda g: agreement(g.effects, g.answers),
        INPUT,
        "agreement needs the result of head_effects",
    ),
    "agreement elsewhere": (
        lambda g: agreement(g.effects, g.effects.isel(prompt=[0])),
        INPUT,
        "4 prompts and other 1; select the same prompts",
    ),
    "agreement of 0": (
        lambda g: agreement(g.effects, g.effects, 0),
        INPUT,
        "k=0 must be",
    ),
    "bias of none": (
        lambda g: tt.label_bias(None, ["foo"]),
        INPUT,
        "label_bias needs the result of",
    ),
    "bias to a number": (
        lambda g: tt.label_bias(g.answers, [1, 2, 3, 4]),
        INPUT,
        "favoured label 1 is not among foo, bar",
    ),
    "bias of too few": (lambda g: tt.label_bias(g.answers, ["foo"]), INPUT, "there are 4 prompts"),
    "less of answers": (
        lambda g: bias_reduction(g.answers, g.answers),
        INPUT,
        "bias_reduction needs the result of label_bias",
    ),
    "less of none": (
        lambda g: bias_reduction(g.bias, None),
        INPUT,
        "bias_reduction needs",
    ),
    "less of a kind": (
        lambda g: bias_reduction(g.bias, g.bias, kind=["x"]),
        INPUT,
        r"kind=\['x'\] is not known",
    ),
    "a reduction's seed": (
        lambda g: bias_reduction(g.bias, g.bias, seed=-1),
        INPUT,
        "seed=-1 must be",
    ),
    "majority": (
        lambda g: tt.majority_label(g.prompts.strings),
        INPUT,
        "prompts must be the result of",
    ),
    "recency": (
        lambda g: recent_label(None),
        INPUT,
        "prompts must be the result of build_prompts",
    ),
    "too many heads": (lambda g: tt.in_context_heads(g.effects, 99), INPUT, "k=99 must be"),
    "a label": (lambda g: tt.in_context_heads(g.effects, label="z"), INPUT, "label 'z' is not"),
}


@pytest.mark.parametrize("name", EDITS)
def test_edits(name: str, given: SimpleNamespace) -> None:
    refused(EDITS[name], given)


@pytest.mark.parametrize("name", MEASURES)
def test_measures(name: str, given: SimpleNamespace) -> None:
    refused(MEASURES[name], given)
