"""What every measure does with arguments that change no number: it records, batches, shows."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
import xarray as xr
from surface import under
from tiny import THREE, tiny

import twotower as tt
from twotower import progress
from twotower.measures.collect import run
from twotower.measures.group_effects import subset_effects
from twotower.measures.measure import Measure
from twotower.walk.memory import readable
from twotower.walk.recorder import Recorder
from twotower.walk.views import End

POOL = [(0, 1), (1, 2)]
LABELS = tt.at(role="label")
PLAIN = {"to": "zero"}


@pytest.fixture(scope="module")
def model() -> tt.Model:
    return tiny("llama-grouped")


@pytest.fixture(scope="module")
def prompts(model: tt.Model) -> tt.Prompts:
    return tt.build_prompts(model, THREE, shots=1, n=4, seed=2)


@pytest.fixture(scope="module")
def other(prompts: tt.Prompts) -> tt.Prompts:
    return prompts.reversed_labels()


MEASURES: dict[str, Callable[..., xr.Dataset]] = {
    "predict": tt.predict,
    "qk_similarity": tt.qk_similarity,
    "ov_labels": tt.ov_labels,
    "attribution": tt.attribution,
    "attention_shares": tt.measures.shares.attention_shares,
    "residual_streams": tt.measures.residual.residual_streams,
    "head_effects": tt.head_effects,
    "pair_effects": tt.pair_effects,
    "attribution_patching": tt.attribution_patching,
    "group_effects": lambda m, p, **how: tt.group_effects(m, p, [POOL], **how),
    "subset_effects": lambda m, p, **how: subset_effects(m, p, POOL, **how),
    "greedy_heads": lambda m, p, **how: tt.greedy_heads(m, p, 2, pool=POOL, **how),
    "causal_tracing": lambda m, p, **how: tt.causal_tracing(m, p, p.reversed_labels(), **how),
}


@pytest.mark.parametrize(
    ("name", "given", "settings"),
    [
        ("qk_similarity", {"keep": "labels"}, {"keep": "labels"}),
        ("ov_labels", {"keep": LABELS}, {"keep": {"role": ["label"]}}),
        ("attribution", {}, {"norm": "frozen"}),
        ("attribution", {"norm": "own"}, {"norm": "own"}),
        ("attention_shares", {"positions": "all"}, {"positions": "all"}),
        ("attention_shares", {"positions": LABELS}, {"positions": {"role": ["label"]}}),
        ("residual_streams", {"keep": "last"}, {"keep": "last"}),
        ("causal_tracing", {"positions": LABELS}, {"positions": {"role": ["label"]}}),
        ("head_effects", {}, {"positions": "last", **PLAIN}),
        ("group_effects", {"positions": LABELS}, {"positions": {"role": ["label"]}, **PLAIN}),
        ("subset_effects", {"positions": "labels"}, {"positions": "labels", **PLAIN}),
        ("greedy_heads", {"positions": "labels"}, {"positions": "labels", **PLAIN}),
        ("pair_effects", {"positions": "labels"}, {"positions": "labels", **PLAIN}),
    ],
)
def test_arguments_are_recorded(
    name: str, given: dict[str, Any], settings: dict[str, Any], model, prompts, other
) -> None:
    found = MEASURES[name](model, prompts, **given)
    recorded = json.loads(found.attrs["settings"])
    if name == "causal_tracing":
        assert recorded.pop("corrupted") == other.hash
    assert recorded == settings
    assert found.attrs["prompts_hash"] == prompts.hash


CHANGES = {
    "times": lambda other: (tt.Times(0.5), {"to": "times", "factor": 0.5}),
    "mean": lambda other: (tt.Mean(other), {"to": "mean", "reference": other.hash}),
    "resample": lambda other: (
        tt.Resample(other, 4),
        {"to": "resample", "reference": other.hash, "seed": 4},
    ),
    "from": lambda other: (tt.From(other), {"to": "from", "donor": other.hash}),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize(
    "name", ["head_effects", "group_effects", "subset_effects", "greedy_heads", "pair_effects"]
)
def test_changes_are_recorded(name: str, change: str, model, prompts, other) -> None:
    to, expected = CHANGES[change](other)
    expected = {"positions": "last", **expected}
    found = MEASURES[name](model, prompts, to=to)
    assert json.loads(found.attrs["settings"]) == expected
    by_gradient = tt.attribution_patching(model, prompts, to=to)
    expected["estimate"] = "gradient"
    assert json.loads(by_gradient.attrs["settings"]) == expected


@pytest.mark.parametrize("array", ["at", "mask"])
def test_positions_given_as_an_array(array: str, model, prompts) -> None:
    at = LABELS if array == "at" else prompts.where("labels")
    found = tt.head_effects(model, prompts, at)
    xr.testing.assert_equal(found, tt.head_effects(model, prompts, "labels"))
    recorded = json.loads(found.attrs["settings"])["positions"]
    assert recorded == ({"role": ["label"]} if array == "at" else "given")


@pytest.mark.parametrize("name", MEASURES)
def test_bars_are_shown_when_asked_for(name: str, model, prompts, capfd, monkeypatch) -> None:
    monkeypatch.setattr("twotower.progress.in_log", lambda: False)
    MEASURES[name](model, prompts)
    assert capfd.readouterr().err == ""
    under(MEASURES[name], model, prompts, progress=True)
    assert "prompt" in capfd.readouterr().err
    if name != "greedy_heads":  # it names its steps
        under(MEASURES[name], model, prompts, progress="a title")
        assert "a title" in capfd.readouterr().err


def test_greedy_names_its_steps(model, prompts, capfd, monkeypatch) -> None:
    monkeypatch.setattr("twotower.progress.in_log", lambda: False)
    under(MEASURES["greedy_heads"], model, prompts, progress=True)
    shown = capfd.readouterr().err
    assert "head 1 of 2" in shown
    assert "head 2 of 2" in shown


def test_a_log_file_gets_lines(model, prompts, capfd, monkeypatch) -> None:
    with progress.stage("a stage"):
        tt.predict(model, prompts)  # too short for a line of its own
    assert capfd.readouterr().err == "a stage\n"
    monkeypatch.setattr("twotower.progress.SECONDS_BETWEEN_LINES", 0.0)
    with progress.stage("a stage"), tt.set_options(batch_size=2):
        tt.predict(model, prompts)
    assert capfd.readouterr().err == "a stage\na stage: 2 of 4 prompts\n"


@pytest.mark.parametrize("name", MEASURES)
def test_batches_are_as_large_as_asked_for(name: str, model, prompts) -> None:
    seen: list[int] = []
    hook = model.module.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    try:
        MEASURES[name](model, prompts)  # what is made once per state of the model
        seen.clear()
        with tt.set_options(proof=False):
            under(MEASURES[name], model, prompts, batch_size=1)
            ones, seen[:] = seen[:], []
            under(MEASURES[name], model, prompts, batch_size=3)
    finally:
        hook.remove()
    assert set(ones) == {1}
    assert set(seen) == {1, 3}
    assert len(ones) == 2 * len(seen)


@pytest.mark.parametrize(
    "name", ["head_effects", "pair_effects", "group_effects", "greedy_heads", "causal_tracing"]
)
def test_budgets_are_kept_to(name: str, model, prompts) -> None:
    with pytest.raises(tt.errors.InputError, match="memory_budget"):
        under(MEASURES[name], model, prompts, memory_budget="1KiB")


def test_scores_keep_what_the_model_was(model, prompts) -> None:
    run = tt.analyze(model, prompts, measures=["qk", "ov"])
    scores = run["scores"].attrs
    assert json.loads(scores["settings"]) == {"prompts": len(prompts)}
    assert scores["model"] == run["qk"].attrs["model"]
    again = tt.two_tower_scores(run).attrs
    assert {k: v for k, v in again.items() if k != "created"} == {
        k: v for k, v in scores.items() if k != "created"
    }
    assert scores["twotower_group"] == "scores"


@pytest.mark.parametrize(
    ("n_bytes", "text"),
    [(1 << 19, "0.5MiB"), (1023 << 20, "1023.0MiB"), (1 << 30, "1.00GiB"), (3 << 29, "1.50GiB")],
)
def test_sizes_are_readable(n_bytes: int, text: str) -> None:
    assert readable(n_bytes) == text


def test_edits_are_recorded(model, prompts, other) -> None:
    at = tt.at(role="label", demonstration=1)
    edits = [
        tt.KnockOut([(0, 0)], "labels", to=tt.Mean(other)),
        tt.KnockOut([(0, 1), (0, 2)], at, to=tt.Times(0.5)),
        tt.ScaleAttention([(1, 0)], 2.0, "labels", positions="all"),
        tt.DropPosition([(1, 1)], prompts.where("labels")),
        tt.KnockOut([(2, 0)], "labels", to=tt.From(other)),
    ]
    found = tt.predict(model, prompts, edits)
    recorded = json.loads(found.attrs["settings"])["edits"]
    assert [(x["edit"], x["heads"], x["positions"]) for x in recorded] == [
        ("KnockOut", [[0, 0]], "labels"),
        ("KnockOut", [[0, 1], [0, 2]], {"role": ["label"], "demonstration": [1]}),
        ("ScaleAttention", [[1, 0]], "all"),
        ("DropPosition", [[1, 1]], "last"),
        ("KnockOut", [[2, 0]], "labels"),
    ]
    assert recorded[0]["reference"] == recorded[4]["donor"] == other.hash
    assert [recorded[i]["to"] for i in (0, 1, 4)] == ["mean", "times", "from"]
    assert recorded[1]["factor"] == 0.5
    assert (recorded[2]["factor"], recorded[2]["keys"]) == (2.0, "labels")
    assert recorded[3]["keys"] == "given"
    bias = tt.label_bias(found, [prompts.labels[0]] * len(prompts))
    assert json.loads(bias.attrs["settings"]) == {"predictions": {"edits": recorded}}


class Misnamed(Recorder):
    """Returns what the schema does not name."""

    group = "shares"

    def finish(self, end: End) -> dict[str, torch.Tensor]:
        return {"nothing": end.residual}


class OfMisnamed(Measure):
    group = "shares"

    def prepare(self, model: tt.Model, prompts: tt.Prompts) -> Any:
        return lambda batch: Misnamed()


def test_results_that_the_schema_does_not_name(llama: tt.Model, prompts: tt.Prompts) -> None:
    with pytest.raises(tt.errors.SchemaError, match="Misnamed returned 'nothing' for .*'shares'"):
        run(llama, prompts, OfMisnamed())


def test_a_change_that_nothing_carries_out(llama, prompts, monkeypatch) -> None:
    """It is not taken for a knock-out."""

    class Other(tt.Zero):
        pass

    monkeypatch.setattr("twotower.edits.prepared.Zero", type("Own", (), {}))
    with pytest.raises(NotImplementedError, match="Other"):
        tt.head_effects(llama, prompts, to=Other())
