"""The main job on the real demo model: the finding itself, on prompts it was not chosen on."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import xarray as xr

import twotower as tt
from twotower.experiments.demo import Finding, check_finding, run_demo, save_finding
from twotower.experiments.random_heads import random_heads

pytestmark = pytest.mark.demo_model


@pytest.fixture(scope="module")
def finding(demo_model: tt.Model) -> Finding:
    return run_demo(demo_model, progress=False)


def test_the_model_learns_in_context(finding: Finding) -> None:
    assert finding.accuracy["before"]["correct"].low > 0.6
    assert finding.accuracy["before"]["top1_correct"].low > 0.6


def test_a_handful_of_heads_carries_it(finding: Finding) -> None:
    assert len(finding.heads) == 12
    assert finding.accuracy["after"]["correct"].value < 0.65
    assert finding.accuracy["after"]["top1_correct"].value < 0.2
    assert finding.accuracy["random heads"]["correct"].value > 0.65
    assert all(drop.low > 0 for drop in finding.drop.values())


def test_the_strongest_head_is_two_towers(finding: Finding) -> None:
    strongest = finding.run["scores"].sel(layer=finding.heads[0].layer, head=finding.heads[0].head)
    assert strongest["qk_auc"] > 0.85
    assert strongest["qk_auc_content"] > 0.85
    assert strongest["ov_auc"] > 0.8
    assert finding.heads[0] in finding.writers
    assert abs(float(finding.run["scores"]["qk_auc"].mean()) - 0.5) < 0.1


def test_all_claims_hold(finding: Finding) -> None:
    assert finding.failures() == []
    check_finding(finding)


def test_selection_and_test_share_no_text(finding: Finding) -> None:
    chosen, tested = finding.selection["prompts"], finding.run["prompts"]
    assert not set(chosen["text"].values) & set(tested["text"].values)


def test_it_fails_loudly(finding: Finding) -> None:
    swapped = Finding(
        finding.heads,
        finding.writers,
        finding.accuracy,
        {name: drop._replace(low=-0.1) for name, drop in finding.drop.items()},
        finding.run,
        finding.selection,
    )
    with pytest.raises(tt.errors.FindingError, match="costs no more correct"):
        check_finding(swapped)


def test_random_heads_are_others(finding: Finding, demo_model: tt.Model) -> None:
    draws = random_heads(demo_model.heads, 12, 5, [0], without=finding.heads)
    assert len(draws) == 5
    for draw in draws:
        assert len(set(draw)) == 12
        assert not set(draw) & set(finding.heads)
    assert len({tuple(sorted(draw)) for draw in draws}) == 5


def test_the_saved_run_can_be_asked(finding: Finding, tmp_path: Path) -> None:
    for path in save_finding(finding, tmp_path / "demo.zarr"):
        tree = xr.open_datatree(path, engine="zarr", consolidated=False)
        assert tree.attrs["model"] == "smollm2-135m"
    run = tt.open(tmp_path / "demo.zarr")
    assert [tuple(h) for h in json.loads(run.attrs["in_context_heads"])] == finding.heads
    layer, head = finding.heads[0]
    attention = run.qk.attention.sel(layer=layer, head=head)
    labels = attention.where(attention.role == "label")
    same = attention.demonstration_class == attention.query_class
    near = labels.where(same).sum("position").mean()
    far = labels.where(~same).sum("position").mean()
    assert float(near) > 1.5 * float(far)


def test_sweep_equals_hooked_forwards(demo_model: tt.Model) -> None:
    """On the real model: every tenth head, knocked out by a plain hook at the last position."""
    import torch

    from twotower.walk.batch_size import Batches

    prompts = tt.build_prompts(demo_model, tt.load_task("animals-cities"), shots=4, n=2)
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
    heads = demo_model.heads[::10]
    expected = np.stack([clean - margins(*head) for head in heads], axis=1)
    ours = np.stack([found[:, layer, head] for layer, head in heads], axis=1)
    assert np.abs(ours - expected).max() <= 1e-4 * np.abs(expected).max()
