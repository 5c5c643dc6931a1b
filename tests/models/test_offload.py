"""Layers that wait in memory or on disk until they are needed: the same numbers."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from surface import FEW, MEASURES, REPEATED, same
from tiny import THREE, byte_level, crossed, hf_model, tiny

import twotower as tt


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A checkpoint of each architecture, written when it is first asked for."""

    @cache
    def folder(name: str) -> Path:
        path = tmp_path_factory.mktemp(name)
        hf_model(name).save_pretrained(path)
        byte_level().save_pretrained(path)
        return path

    return folder


@cache
def prompts(name: str) -> tt.Prompts:
    return tt.build_prompts(tiny(name), THREE, shots=1, n=3, seed=2)


def offloaded(folder: Path, name: str, where: str, everything: bool) -> tt.Model:
    """The model with its layers on disk but for the first, or all of it."""
    parts = [child for child, _ in hf_model(name).named_modules() if child.count(".") <= 2]
    layers = [part for part in parts if part.rpartition(".")[2].isdigit()]
    owner, path = layers[0].split(".")[0], layers[0].rpartition(".")[0]
    rest = [p for p in parts if p.rpartition(".")[0] == owner and p != path]
    rest += [p for p in parts if p and "." not in p and p != owner]
    device_map = dict.fromkeys(rest, where if everything else "cpu")
    device_map |= {part: where for part in layers}
    device_map[layers[0]] = "cpu"
    return tt.load(
        folder,
        device_map=device_map,
        offload_folder=str(folder / "offload"),
        attn_implementation="eager",
    )


@cache
def layers_on_disk(folder: Path, name: str) -> tt.Model:
    return offloaded(folder, name, "disk", everything=False)


@pytest.mark.parametrize(
    ("name", "what"),
    crossed([x for x in MEASURES if x != "gradient"], FEW[1:], rare=set(REPEATED) - {*FEW}),
)
def test_layers_on_disk(name: str, what: str, folders: Any) -> None:
    model = layers_on_disk(folders(name), name)
    assert {p.device.type for p in model.module.parameters()} == {"cpu", "meta"}
    assert model.devices == [torch.device("cpu")]
    expected = MEASURES[what](tiny(name), prompts(name))
    same(MEASURES[what](model, prompts(name)), expected, 1e-5)


@pytest.mark.parametrize("name", ["gptj", "llama-grouped", "neox-parallel"])
def test_embedding_and_unembedding_too(name: str, folders: Any) -> None:
    model = offloaded(folders(name), name, "disk", everything=True)
    assert model.module.get_input_embeddings().weight.device.type == "meta"
    for what in ("analyze", "labels", "edits"):
        expected = MEASURES[what](tiny(name), prompts(name))
        same(MEASURES[what](model, prompts(name)), expected, 1e-5)


def test_everything_on_disk(checkpoint: Path, prompts: tt.Prompts, tmp_path: Path) -> None:
    here = tt.load(checkpoint)
    away = tt.load(
        checkpoint, device_map="auto", max_memory={"cpu": 1}, offload_folder=tmp_path / "offload"
    )
    assert set(away.device_map.values()) == {"disk"}
    expected = tt.predict(here, prompts).logit.values
    np.testing.assert_allclose(tt.predict(away, prompts).logit.values, expected, rtol=1e-5)
