"""Small parts of measures, by hand."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from nnsight.intervention.backends.remote import RemoteError
from surface import under
from tiny import TWO, byte_level, hf_model, tiny

import twotower as tt
from twotower.measures.analyze import choose_measures
from twotower.measures.attribution import AttributionRecorder
from twotower.measures.ov import LabelValuesRecorder, TopTokens
from twotower.measures.qk import SimilarityRecorder
from twotower.measures.residual import ResidualRecorder
from twotower.measures.shares import SharesRecorder
from twotower.sweep.sweep import Sweep
from twotower.walk.batch import ordered
from twotower.walk.batch_size import out_of_memory
from twotower.walk.scores import _mean_before

SENTENCES = [
    "red cat red dog red cat\n: foo\nblue sky\n: bar\n",
    "green sea green sky green sea\n: bar\nblue cat\n: foo\n",
]


def test_mean_over_positions_so_far() -> None:
    table = torch.arange(8.0).view(1, 4, 1, 2)
    at = torch.tensor([[False, True, False, True], [False, False, False, False]])
    found = _mean_before(table, at)[:, :, 0]
    # Before the first of them a position keeps its own: distance 0.
    assert found[0].tolist() == [[0, 1], [2, 3], [2, 3], [4, 5]]
    torch.testing.assert_close(found[1], table[0, :, 0])


def test_prompts_that_begin_alike_stand_together() -> None:
    model = tiny("gpt2")
    strings = [SENTENCES[i % 2] + "red " * (i // 2) + "cat\n:" for i in range(6)]
    spans = [[(m.start(), m.end()) for m in re.finditer("foo|bar", text)] for text in strings]
    prompts = tt.prompts_from_strings(model, strings, spans, ["foo"] * 6)
    rows = ordered(model, prompts, shared=True).tolist()
    assert [row % 2 for row in rows] in ([0, 0, 0, 1, 1, 1], [1, 1, 1, 0, 0, 0])
    lengths = prompts.lengths[rows]
    assert lengths[0] == prompts.lengths.max()
    assert (np.diff(lengths[:3]) <= 0).all()
    assert (np.diff(lengths[3:]) <= 0).all()
    plain = ordered(model, prompts)
    assert (np.diff(prompts.lengths[plain]) <= 0).all()


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried 8 bytes"), True),
        (RemoteError("the job failed: CUDA Out Of Memory. Tried to allocate"), True),
        (RemoteError("the job failed: no such layer"), False),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
    ],
)
def test_memory_that_ran_out(error: Exception, expected: bool) -> None:
    assert out_of_memory(error) is expected


@pytest.mark.parametrize("positions", ["last", "labels", "all"])
def test_what_a_sweep_costs(positions: str) -> None:
    model = tiny("gpt2")
    prompts = tt.build_prompts(model, TWO, shots=2, n=3, seed=1)
    heads = [(0, 1), (1, 0), (model.n_layers - 1, 2)]
    found = tt.group_effects(model, prompts, [[head] for head in heads], positions)
    shares = []
    for row in range(len(prompts)):
        at = np.flatnonzero(prompts.where(positions)[row])
        # A change is felt from its first position on.
        shares.append((prompts.n_positions - at[0]) / prompts.lengths[row])
    blocks = sum(model.n_layers - layer for layer, _ in heads)
    expected = 1 + np.mean(shares) * blocks / model.n_layers
    assert json.loads(str(found.attrs["forwards"])) == pytest.approx(expected, abs=0.0051)


def test_what_is_kept_where_prompts_have_fewer() -> None:
    model = tiny("gpt2")
    prompts = tt.build_prompts(model, TWO, shots=2, n=6, seed=1)
    at = tt.at(role="query")
    kept = tt.qk_similarity(model, prompts, keep=at)
    counts = at.mask(prompts).sum(axis=1)
    assert len(set(counts)) > 1
    for row, count in enumerate(counts):
        own = kept.isel(prompt=row)
        empty = np.arange(own.sizes["position"]) < own.sizes["position"] - count
        assert (own["role"].values == np.where(empty, "pad", "query")).all()
        assert (own["demonstration"].values[empty] == -1).all()
        for name in ("label_text", "demonstration_class"):
            assert (own[name].values[empty] == "").all()
        assert np.isnan(own["score"].values[..., empty]).all()
        assert not np.isnan(own["score"].values[..., ~empty]).any()


@pytest.mark.parametrize("what", ["attention", "values", "z"])
def test_a_prompt_as_its_own_donor_changes_nothing_even_at_token_0(what: str) -> None:
    model = tt.load(hf_model("llama"), tokenizer=byte_level(bos=True))
    prompts = tt.build_prompts(model, TWO, shots=2, n=4, seed=1)
    assert (prompts.token_id == 0).any()  # <s>, which is no padding
    plain = tt.predict(model, prompts)
    edit = tt.KnockOut(model.heads, to=tt.From(prompts))
    if what != "z":
        edit = tt.Patch(model.heads, prompts, what)
    patched = tt.predict(model, prompts, [edit])
    np.testing.assert_allclose(patched["logit"], plain["logit"], atol=2e-5)


def test_measures_named_twice_are_made_once() -> None:
    chosen = choose_measures(["qk", "predictions", "qk"])
    assert [measure.group for measure in chosen] == ["qk", "predictions"]


def test_what_analyze_records() -> None:
    model = tiny("gpt2")
    prompts = tt.build_prompts(model, TWO, shots=2, n=2, seed=1)
    run = tt.analyze(model, prompts, norm="own", keep="labels")
    recorded = {name: json.loads(part.attrs["settings"]) for name, part in run.children.items()}
    assert recorded == {
        "prompts": {},
        "predictions": {},
        "effects": {"to": "zero", "positions": "last"},
        "attribution": {"norm": "own"},
        "qk": {"keep": "labels"},
        "ov": {"keep": "labels"},
        "scores": {"prompts": 2},
    }


def test_messages_say_what_there_is() -> None:
    model = tiny("gpt2")
    prompts = tt.build_prompts(model, TWO, shots=2, n=2, seed=1)
    last = f"layers 0 to {model.n_layers - 1} and heads 0 to {model.n_heads - 1}"
    with pytest.raises(tt.errors.InputError, match=last):
        tt.predict(model, prompts, [tt.KnockOut([(99, 0)], positions="all")])
    with pytest.raises(tt.errors.InputError, match="seed=-1"):
        tt.KnockOut([(0, 0)], positions="all", to=tt.Resample(prompts, -1))
    with pytest.raises(tt.errors.InputError, match="twice"):
        tt.group_effects(model, prompts, [[(0, 1)], [(1, 1)], [(1, 1)]])
    with pytest.raises(tt.errors.InputError, match=r"most frequent label: \{'foo': 2, 'bar': 2\}"):
        tt.majority_label(prompts)
    described = tt.DropPosition([(0, 0)], keys="labels").describe()
    assert described["keys"] == "labels"


def test_what_greedy_steps_cost() -> None:
    model = tiny("gpt2")
    prompts = tt.build_prompts(model, TWO, shots=2, n=3, seed=1)
    pool = [(0, 1), (1, 2), (2, 0)]
    found = tt.greedy_heads(model, prompts, 2, pool=pool)
    first = (int(found["chosen_layer"][0]), int(found["chosen_head"][0]))
    left = [[head, first] for head in pool if head != first]
    steps = [
        tt.group_effects(model, prompts, groups).attrs
        for groups in ([[head] for head in pool], left)
    ]
    assert found.attrs["forwards"] == pytest.approx(sum(x["forwards"] for x in steps), abs=0.006)
    assert found.attrs["separate_forwards"] == 4 + 3


def test_edits_of_one_head_that_meet_in_no_prompt() -> None:
    """Looking positions of one prompt and keys of another make no edit twice."""
    model = tiny("llama-grouped")
    prompts = tt.build_prompts(model, TWO, shots=2, n=2, seed=1)
    last, labels = prompts.where("last"), prompts.where("labels")
    of_first, of_second = last.copy(), last.copy()
    of_first[1], of_second[0] = False, False
    # In prompt 0 both look and their keys differ; in prompt 1 keys are the same, one looks.
    apart = labels.copy()
    apart[0] = prompts.where("all")[0] & ~labels[0]
    head = [(1, 1)]
    edits = [
        tt.ScaleAttention(head, 0.5, labels, positions=last),
        tt.ScaleAttention(head, 0.5, apart, positions=of_first),
    ]
    assert np.isfinite(tt.predict(model, prompts, edits)["logit"].values).all()
    twice = [edits[0], tt.ScaleAttention(head, 0.5, apart, positions=of_second)]
    with pytest.raises(tt.errors.InputError, match=r"the attention of head .* is edited twice"):
        tt.predict(model, prompts, twice)


def test_messages_name_what_is_wrong() -> None:
    model = tiny("gpt2")
    prompts = tt.build_prompts(model, TWO, shots=2, n=2, seed=1)
    with pytest.raises(tt.errors.InputError, match=r"^the group 1\.1 is given twice"):
        tt.group_effects(model, prompts, [[(0, 1)], [(1, 1)], [(1, 1)]])
    with pytest.raises(tt.errors.InputError, match=r"^factor=nan"):
        tt.ScaleAttention([(0, 0)], float("nan"), "labels")
    everything = prompts.where("all")
    everything[0] = prompts.where("labels")[0]
    cut = tt.ScaleAttention([(0, 0)], 0.0, everything, positions="all", renormalize=True)
    with pytest.raises(
        tt.errors.InputError, match=r"^prompt 1: a position sees nothing but the keys"
    ):
        tt.predict(model, prompts, [cut])


def tensors(kept: Any) -> Iterator[torch.Tensor]:
    """All tensors in lists, dicts and dataclasses."""
    if isinstance(kept, torch.Tensor):
        yield kept
    elif isinstance(kept, (list, tuple)):
        for part in kept:
            yield from tensors(part)
    elif isinstance(kept, dict):
        yield from tensors(list(kept.values()))
    elif is_dataclass(kept) and not isinstance(kept, type):
        yield from tensors([getattr(kept, field.name, None) for field in fields(kept)])


@pytest.mark.parametrize("keep", ["all", "labels"])
def test_what_is_kept_of_a_layer_holds_on_to_no_more(keep: str, monkeypatch) -> None:
    """A view of a layer's tensor would keep all of it until the walk is over."""
    model = tiny("llama-grouped")
    prompts = tt.build_prompts(model, TWO, shots=2, n=3, seed=1)
    seen: dict[str, int] = {}

    def watch(kind: type) -> None:
        finish = kind.finish

        def watched(self: Any, end: Any) -> Any:
            own = {
                name: part
                for name, part in vars(self).items()
                if name in ("found", "base", "outputs", "layers", "rows", "vectors")
            }
            for x in tensors(own):
                assert x.untyped_storage().nbytes() <= x.numel() * x.itemsize, type(self)
                seen[type(self).__name__] = seen.get(type(self).__name__, 0) + 1
            return finish(self, end)

        monkeypatch.setattr(kind, "finish", watched)

    kinds = (
        AttributionRecorder,
        LabelValuesRecorder,
        ResidualRecorder,
        SharesRecorder,
        SimilarityRecorder,
        Sweep,
        TopTokens,
    )
    for kind in kinds:
        watch(kind)
    tt.analyze(model, prompts, keep=keep)
    under(tt.head_effects, model, prompts, memory_budget="700KiB")
    tt.ov_labels(model, prompts, keep=keep, top_tokens=[(1, 1)])
    tt.measures.residual.residual_streams(model, prompts, keep=keep)
    tt.measures.shares.attention_shares(model, prompts)
    assert set(seen) == {kind.__name__ for kind in kinds}


def test_twelve_heads_by_default() -> None:
    model = tiny("gpt2")
    few = tt.head_effects(model, tt.build_prompts(model, TWO, shots=2, n=2, seed=1))
    more = few.assign_coords(head=few["head"] + model.n_heads)
    wide = xr.concat([few, more], "head", combine_attrs="override")
    assert len(tt.in_context_heads(wide)) == 12
    with pytest.raises(tt.errors.InputError, match="KnockOut, ScaleAttention, DropPosition, Patch"):
        tt.predict(model, tt.build_prompts(model, TWO, n=2), [3])
