"""The main job on the real demo model: the finding itself, on prompts it was not chosen on.

`make test` looks at few and short prompts, whose numbers point the same way; the finding itself,
with its intervals, is left to `make test-all`.
"""

from __future__ import annotations

import io
import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
from rich.console import Console

import twotower as tt
from twotower.experiments import demo
from twotower.experiments.demo import (
    Finding,
    check_finding,
    print_finding,
    run_demo,
    save_finding,
)
from twotower.experiments.random_heads import random_heads

pytestmark = pytest.mark.demo_model
AUCS = ("qk_auc", "qk_auc_content", "ov_auc")


@pytest.fixture(scope="module")
def finding(demo_model: tt.Model) -> Finding:
    return run_demo(demo_model, progress=False)


@pytest.fixture(scope="module")
def short(demo_model: tt.Model) -> Finding:
    """The same on 16 prompts of five shots, with one set of random heads."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "N_PROMPTS", 16)
        patch.setattr(demo, "N_RANDOM", 1)
        patch.setattr("twotower.prompts.build_prompts", partial(tt.build_prompts, shots=5))
        return run_demo(demo_model, progress=False)


def test_the_same_on_few_prompts(short: Finding) -> None:
    """Claims that hold for each of the seeds 0 to 3."""
    accuracy = {name: row["top1_correct"].value for name, row in short.accuracy.items()}
    assert min(accuracy["before"], accuracy["random heads"]) > 0.7
    assert accuracy["after"] < 0.2
    assert short.accuracy["after"]["correct"].value < short.accuracy["before"]["correct"].value
    assert short.drop["top1_correct"].low > 0
    assert len(short.heads) == 12
    for name in ("qk_auc", "ov_auc"):
        mean, bound = short.compare(name)
        assert mean > bound
    scores = short.run["scores"]
    strongest = scores.sel(layer=short.heads[0].layer, head=short.heads[0].head)
    assert min(strongest[x] for x in AUCS) > 0.8
    assert short.seconds.keys() == {
        "building prompts",
        "sweeping every head",
        "measuring QK and OV",
        "knocking out in-context heads",
        "knocking out random heads, 1 draws",
    }
    # Eight prompts are too few for the accuracy between two labels, and for nothing else.
    assert all("costs no more correct" in words for words in short.failures())


@pytest.mark.slow
def test_the_model_learns_in_context(finding: Finding) -> None:
    assert finding.accuracy["before"]["correct"].low > 0.6
    assert finding.accuracy["before"]["top1_correct"].low > 0.6


@pytest.mark.slow
def test_a_handful_of_heads_carries_it(finding: Finding) -> None:
    assert len(finding.heads) == 12
    assert finding.accuracy["after"]["correct"].value < 0.65
    assert finding.accuracy["after"]["top1_correct"].value < 0.2
    assert finding.accuracy["random heads"]["correct"].value > 0.65
    assert all(drop.low > 0 for drop in finding.drop.values())


@pytest.mark.slow
def test_the_strongest_head_is_two_towers(finding: Finding) -> None:
    strongest = finding.run["scores"].sel(layer=finding.heads[0].layer, head=finding.heads[0].head)
    assert strongest["qk_auc"] > 0.85
    assert strongest["qk_auc_content"] > 0.85
    assert strongest["ov_auc"] > 0.8
    assert finding.heads[0] in finding.writers
    assert abs(float(finding.run["scores"]["qk_auc"].mean()) - 0.5) < 0.1


@pytest.mark.slow
def test_all_claims_hold(finding: Finding) -> None:
    assert finding.failures() == []
    check_finding(finding)


def test_selection_and_test_share_no_text(short: Finding) -> None:
    chosen, tested = short.selection["prompts"], short.run["prompts"]
    assert not set(chosen["text"].values) & set(tested["text"].values)


def test_it_fails_loudly(short: Finding, demo_model: tt.Model) -> None:
    for low, fails in ((0.1, False), (-0.1, True)):
        drop = {name: drop._replace(low=low) for name, drop in short.drop.items()}
        changed = replace(short, drop=drop)
        if fails:
            with pytest.raises(tt.errors.FindingError, match="costs no more correct"):
                check_finding(changed)
        else:
            check_finding(changed)
    chance = {"before": {"correct": short.accuracy["before"]["correct"]._replace(low=0.5)}}
    assert "is not above chance" in replace(short, accuracy=chance).failures()[0]
    order = np.argsort(short.run["scores"]["qk_auc"].values, axis=None)
    weakest = replace(short, writers=[demo_model.heads[i] for i in order[:12]])
    assert any("mean qk_auc" in words for words in weakest.failures())


def test_the_finding_is_printed(short: Finding) -> None:
    """Every number of the tables is that of the finding."""
    console = Console(file=io.StringIO(), width=120)
    print_finding(short, console)
    text = console.file.getvalue()
    for row in short.accuracy.values():
        assert all(str(value) in text for value in row.values())
    scores = short.run["scores"]
    shown = [line.split("│")[1:-1] for line in text.splitlines() if line.startswith("│")]
    lines = {cells[0].strip(): [cell.strip() for cell in cells[1:]] for cells in shown}
    for head in {*short.heads, *short.writers}:
        known = [float(scores[x].sel(layer=head.layer, head=head.head)) for x in AUCS]
        assert lines[str(head)][1:] == [f"{x:.2f}" for x in known]
    assert text.count("their mean") == text.count("mean of all") == 2


def test_random_heads_are_others(short: Finding, demo_model: tt.Model) -> None:
    draws = random_heads(demo_model.heads, 12, 5, [0], without=short.heads)
    assert len(draws) == 5
    for draw in draws:
        assert len(set(draw)) == 12
        assert not set(draw) & set(short.heads)
    assert len({tuple(sorted(draw)) for draw in draws}) == 5


def test_the_saved_run_can_be_asked(short: Finding, tmp_path: Path) -> None:
    for path in save_finding(short, tmp_path / "demo.zarr"):
        tree = xr.open_datatree(path, engine="zarr", consolidated=False)
        assert tree.attrs["model"] == "smollm2-135m"
    run = tt.open(tmp_path / "demo.zarr")
    assert [tuple(h) for h in json.loads(run.attrs["in_context_heads"])] == short.heads
    layer, head = short.heads[0]
    attention = run.qk.attention.sel(layer=layer, head=head)
    labels = attention.where(attention.role == "label")
    same = attention.demonstration_class == attention.query_class
    near = labels.where(same).sum("position").mean()
    far = labels.where(~same).sum("position").mean()
    assert float(near) > 1.5 * float(far)


@pytest.mark.parametrize("every", [31, pytest.param(10, marks=pytest.mark.slow)])
def test_sweep_equals_hooked_forwards(every: int, demo_model: tt.Model) -> None:
    """On the real model: some heads, knocked out by a plain hook at the last position."""
    import torch

    from twotower.walk.batch_size import Batches

    prompts = tt.build_prompts(demo_model, tt.load_task("animals-cities"), shots=2, n=2)
    effects = tt.head_effects(demo_model, prompts, logprobs=False)
    (batch,) = Batches(demo_model, prompts, 2)
    width = demo_model.d_head

    def margins(layer: int | None, head: int | None) -> np.ndarray:
        def hook(module, arguments):
            z = arguments[0].clone()
            z[:, -1, head * width : (head + 1) * width] = 0
            return (z,)

        handle = None
        if layer is not None:
            projection = demo_model.module.model.layers[layer].self_attn.o_proj
            handle = projection.register_forward_pre_hook(hook)
        with torch.no_grad():
            logits = demo_model.module(**batch.inputs).logits[:, -1, list(prompts.label_ids)]
        if handle is not None:
            handle.remove()
        gold = prompts.gold_index[batch.rows]
        values = logits.numpy()
        rows = np.arange(len(gold))
        return values[rows, gold] - values[rows, 1 - gold]

    clean = margins(None, None)
    found = effects["margin_drop"].values[batch.rows]
    heads = demo_model.heads[::every]
    expected = np.stack([clean - margins(*head) for head in heads], axis=1)
    ours = np.stack([found[:, layer, head] for layer, head in heads], axis=1)
    assert np.abs(ours - expected).max() <= 1e-4 * np.abs(expected).max()
