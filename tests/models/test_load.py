"""Loading from folders and objects, and what is said where it cannot be done."""

from __future__ import annotations

import json
from pathlib import Path

import nnsight
import numpy as np
import pytest
import torch
from tiny import TWO, byte_level, hf_model
from transformers import BloomConfig, BloomForCausalLM

import twotower as tt


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    hf_model("llama-grouped").save_pretrained(tmp_path)
    byte_level().save_pretrained(tmp_path)
    return tmp_path


def margins(model: tt.Model) -> np.ndarray:
    return tt.predict(model, tt.build_prompts(model, TWO, shots=2, n=3))["margin"].values


@pytest.mark.parametrize("name", ["gpt2", "gptj", "llama", "neox-parallel", "qwen3"])
def test_a_folder_gives_the_same_model(name: str, tmp_path: Path) -> None:
    module = hf_model(name)
    module.save_pretrained(tmp_path)
    byte_level().save_pretrained(tmp_path)
    model = tt.load(tmp_path)
    assert model.name == str(tmp_path)
    assert (model.n_layers, model.n_heads, model.d_model) == (3, 4, 48)
    expected = margins(tt.load(module, tokenizer=byte_level()))
    np.testing.assert_allclose(margins(model), expected, rtol=1e-5, atol=1e-6)


def test_shards(tmp_path: Path) -> None:
    module = hf_model("llama")
    module.save_pretrained(tmp_path, max_shard_size="60KB")
    byte_level().save_pretrained(tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    expected = margins(tt.load(module, tokenizer=byte_level()))
    np.testing.assert_allclose(margins(tt.load(tmp_path)), expected, rtol=1e-5, atol=1e-6)


def test_from_nnsight() -> None:
    module = hf_model("llama")
    traced = nnsight.TransformersModel(module, task="text-generation", tokenizer=byte_level())
    model = tt.load(traced)
    assert model.traced is traced
    assert model.module is module
    expected = margins(tt.load(module, tokenizer=byte_level()))
    np.testing.assert_array_equal(margins(model), expected)


def test_dtype_and_device_map(folder: Path) -> None:
    assert tt.load(folder, dtype="bfloat16").dtype == torch.bfloat16
    assert tt.load(folder, dtype=torch.float16, check=False).dtype == torch.float16
    model = tt.load(folder, device_map="cpu")
    assert model.device == torch.device("cpu")
    assert model.device_map == {"": "cpu"}


def test_offloaded_to_disk(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    device_map = {
        "model.embed_tokens": "cpu",
        "model.norm": "cpu",
        "model.rotary_emb": "cpu",
        "lm_head": "cpu",
        "model.layers.0": "cpu",
        "model.layers.1": "disk",
        "model.layers.2": "disk",
    }
    offload = tmp_path_factory.mktemp("offload")
    model = tt.load(folder, device_map=device_map, offload_folder=str(offload))
    assert next(model.module.model.layers[2].parameters()).device.type == "meta"
    whole = tt.load(folder)
    prompts = tt.build_prompts(whole, TWO, shots=2, n=3)
    for positions in ("last", "labels"):
        found = tt.head_effects(model, prompts, positions)["margin_drop"].values
        expected = tt.head_effects(whole, prompts, positions)["margin_drop"].values
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_bfloat16_is_close(folder: Path) -> None:
    full, half = tt.load(folder), tt.load(folder, dtype="bfloat16")
    prompts = tt.build_prompts(full, TWO, shots=2, n=3)
    expected = tt.head_effects(full, prompts)["margin_drop"].values
    found = tt.head_effects(half, prompts)["margin_drop"].values
    assert np.abs(found - expected).max() < 0.1 * np.abs(expected).max()
    assert found.dtype == np.float32


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"quantization": "int3"}, "quantization='int3' is not known"),
        ({"dtype": "float17"}, "dtype='float17'"),
        ({"dtype": "int64"}, "not a floating-point type"),
    ],
)
def test_bad_arguments(folder: Path, arguments: dict, message: str) -> None:
    with pytest.raises(tt.InputError, match=message):
        tt.load(folder, **arguments)


def test_objects_that_are_no_models() -> None:
    with pytest.raises(tt.InputError, match="cannot load a dict"):
        tt.load({})
    with pytest.raises(tt.InputError, match="needs its tokenizer"):
        tt.load(hf_model("llama"))
    with pytest.raises(tt.InputError, match="is loaded already"):
        tt.load(hf_model("llama"), tokenizer=byte_level(), dtype="float32")


def test_no_such_folder() -> None:
    with pytest.raises(tt.ModelError, match="there is no folder ./nowhere"):
        tt.load("./nowhere")


def test_no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(tt.ModelError, match="could not be had from the hub"):
        tt.load("nobody/nothing-at-all")


def test_truncated_weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(tt.ModelError, match="is damaged"):
        tt.load(folder)


def test_missing_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(tt.ModelError, match="holds no complete model"):
        tt.load(folder)


def test_broken_configuration(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "llama", ')
    with pytest.raises(tt.ModelError, match=str(folder)):
        tt.load(folder)


def test_a_folder_without_a_tokenizer(folder: Path) -> None:
    for path in folder.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(tt.ModelError, match=str(folder)):
        tt.load(folder)


def test_unknown_architecture() -> None:
    torch.manual_seed(0)
    module = BloomForCausalLM(BloomConfig(hidden_size=32, n_layer=2, n_head=4, vocab_size=400))
    with pytest.raises(tt.ModelError, match="'bloom' .*Known architectures: gpt2, gpt_neox"):
        tt.load(module, tokenizer=byte_level())


def test_an_unnamed_relative_is_served_by_structure(folder: Path) -> None:
    """A model type that no adapter names, with Llama's structure: proved, then taken."""
    from twotower.models.llama import Llama
    from twotower.models.registry import find_architecture

    module = hf_model("llama")
    module.config.model_type = "something-new"
    assert type(find_architecture(module.config, module)) is Llama
    saved = json.loads((folder / "config.json").read_text())
    assert saved["model_type"] == "llama"


def test_what_is_no_tokenizer() -> None:
    with pytest.raises(tt.InputError, match="a dict is no tokenizer"):
        tt.load(hf_model("llama"), tokenizer={"cat": 1})
