"""Random models of given shapes: what they are, and the memory that making them takes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import TWO, byte_level, hf_model, wide_config

import twotower as tt
from twotower.errors import InputError, ModelError
from twotower.models.load import load_config
from twotower.models.random_weights import SHAPES, on_meta


@pytest.mark.parametrize(
    ("name", "layers", "heads", "d_head", "billions"),
    [
        ("gpt2-large", 36, 20, 64, 0.774),
        ("gpt-j-6b", 28, 16, 256, 6.05),
        ("llama-7b", 32, 32, 128, 6.738),
    ],
)
def test_shipped_shapes(name: str, layers: int, heads: int, d_head: int, billions: float) -> None:
    config = load_config(name)
    assert (config.num_hidden_layers, config.num_attention_heads) == (layers, heads)
    assert config.hidden_size // config.num_attention_heads == d_head
    module = on_meta(config)
    module.tie_weights()
    assert sum(p.numel() for p in module.parameters()) / 1e9 == pytest.approx(billions, rel=1e-3)


@pytest.fixture(params=["gpt2", "gptj", "llama-grouped", "neox-parallel", "qwen3"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A folder with a configuration alone."""
    hf_model(request.param).config.save_pretrained(tmp_path)
    return tmp_path


def test_a_configuration_is_enough(folder: Path) -> None:
    model = tt.load(folder, weights="random")
    assert (model.n_layers, model.n_heads, model.revision) == (3, 4, "random weights")
    state = model.module.state_dict()
    for name, tensor in state.items():
        if tensor.dim() > 1:
            assert float(tensor.std()) == pytest.approx(0.02, rel=0.2), name
    other = tt.load(folder, weights="random")
    assert all(torch.equal(tensor, state[k]) for k, tensor in other.module.state_dict().items())
    found = tt.predict(model, tt.build_prompts(model, TWO, shots=2, n=3))
    assert np.isfinite(found["margin"].values).all()


def test_weights_differ_from_each_other(tmp_path: Path) -> None:
    hf_model("llama").config.save_pretrained(tmp_path)
    state = tt.load(tmp_path, weights="random").module.state_dict()
    first = state["model.layers.0.self_attn.q_proj.weight"]
    assert not torch.equal(first, state["model.layers.1.self_attn.q_proj.weight"])
    assert not torch.equal(first, state["model.layers.0.self_attn.k_proj.weight"])


def test_a_tokenizer_at_hand_is_taken(tmp_path: Path) -> None:
    hf_model("llama").config.save_pretrained(tmp_path)
    byte_level().save_pretrained(tmp_path)
    model = tt.load(tmp_path, weights="random")
    assert model.tokenizer.get_vocab() == byte_level().get_vocab()


@pytest.mark.parametrize("quantization", ["int8", "nf4"])
@pytest.mark.parametrize("shape", ["gpt2", "gptj", "llama"])
def test_quantized(shape: str, quantization: str, tmp_path: Path) -> None:
    wide_config(shape, 64).save_pretrained(tmp_path)
    model = tt.load(tmp_path, weights="random", quantization=quantization)
    assert model.quantization == quantization
    projection = model.architecture.projection(model.architecture.layers(model.module)[0])
    assert projection.weight.dtype == {"int8": torch.int8, "nf4": torch.uint8}[quantization]


def test_offloaded(tmp_path: Path) -> None:
    hf_model("llama").config.save_pretrained(tmp_path)
    device_map = {
        "model.embed_tokens": "cpu",
        "model.rotary_emb": "cpu",
        "model.layers.0": "cpu",
        "model.layers.1": "disk",
        "model.layers.2": "disk",
        "model.norm": "cpu",
        "lm_head": "cpu",
    }
    model = tt.load(
        tmp_path, weights="random", device_map=device_map, offload_folder=str(tmp_path / "off")
    )
    plain = tt.load(tmp_path, weights="random")
    prompts = tt.build_prompts(plain, TWO, shots=2, n=3)
    found, expected = (tt.predict(m, prompts)["margin"].values for m in (model, plain))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)


def test_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="use one of random"):
        tt.load("llama-7b", weights="zero")
    with pytest.raises(InputError, match="leave out weights="):
        tt.load("llama-7b", weights="random", remote=True)
    with pytest.raises(InputError, match="loaded already"):
        tt.load(hf_model("llama"), tokenizer=byte_level(), weights="random")
    with pytest.raises(ModelError, match="no folder"):
        tt.load(str(tmp_path / "none"), weights="random")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "t5"}))
    with pytest.raises(ModelError, match="no causal language model"):
        tt.load(tmp_path, weights="random")


PEAK = """
import sys
import twotower as tt
from twotower.models.load import load_config
from twotower.models.random_weights import on_meta
config = load_config(sys.argv[1])
import nnsight, transformers, bitsandbytes
on_meta(config)
from twotower.sizing.bench import most_resident
before = most_resident()
model = tt.load(sys.argv[1], weights="random", quantization=sys.argv[2] or None, check=False)
size = model.module.get_memory_footprint()
print(size, most_resident() - before)
"""


@pytest.mark.slow
@pytest.mark.parametrize("quantization", ["", "nf4"])
def test_memory_of_making_one(quantization: str, tmp_path: Path) -> None:
    config = load_config("llama-7b")
    config.hidden_size, config.num_hidden_layers, config.intermediate_size = 1024, 8, 4096
    config.num_attention_heads = config.num_key_value_heads = 16
    config.save_pretrained(tmp_path)
    layer = 2 * (4 * 1024**2 + 3 * 1024 * 4096)  # bfloat16
    done = subprocess.run(
        [sys.executable, "-c", PEAK, str(tmp_path), quantization],
        capture_output=True,
        text=True,
        check=True,
    )
    size, peak = map(int, done.stdout.split())
    # The embedding is larger than a layer; libraries are read in at the first use.
    spare = max(layer, 2 * 1024 * 32000) + (100 << 20)
    assert peak < size + spare, (size, peak)


def test_names_of_shapes_are_told() -> None:
    assert set(SHAPES) == {"gpt2-large", "gpt-j-6b", "llama-7b"}
