"""Loading from folders and objects, and what is said where it cannot be done."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import nnsight
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import TWO, byte_level, hf_model
from transformers import (
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)

import twotower as tt
from twotower.errors import InputError


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
        ({"dtype": torch.int8}, "not a floating-point type"),
        ({"dtype": 16}, "dtype=16 is not a torch dtype"),
        ({"tokenizer": 5}, "a int is not a tokenizer"),
    ],
)
def test_bad_arguments(folder: Path, arguments: dict, message: str) -> None:
    with pytest.raises(tt.errors.InputError, match=message):
        tt.load(folder, **arguments)


def test_objects_that_are_no_models() -> None:
    with pytest.raises(tt.errors.InputError, match="cannot load a dict"):
        tt.load({})
    with pytest.raises(tt.errors.InputError, match="needs its tokenizer"):
        tt.load(hf_model("llama"))
    with pytest.raises(tt.errors.InputError, match="is loaded already"):
        tt.load(hf_model("llama"), tokenizer=byte_level(), dtype="float32")


def test_no_such_folder() -> None:
    with pytest.raises(tt.errors.ModelError, match=r"there is no folder ./nowhere"):
        tt.load("./nowhere")


def test_no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(tt.errors.ModelError, match="could not be loaded from the hub"):
        tt.load("nobody/nothing-at-all")


def test_truncated_weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(tt.errors.ModelError, match="is damaged"):
        tt.load(folder)


def test_missing_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(tt.errors.ModelError, match="holds no complete model"):
        tt.load(folder)


def test_broken_configuration(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "llama", ')
    with pytest.raises(tt.errors.ModelError, match=str(folder)):
        tt.load(folder)


def test_a_folder_without_a_tokenizer(folder: Path) -> None:
    for path in folder.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(tt.errors.ModelError, match=str(folder)):
        tt.load(folder)


def test_unknown_architecture() -> None:
    module = hf_model("gpt2")
    module.config.model_type = "something-new"
    with pytest.raises(tt.errors.ModelError, match=r"'something-new'\..*--suggest.*subclassing"):
        tt.load(module, tokenizer=byte_level())


def test_a_structure_is_not_taken_for_an_architecture() -> None:
    """A model type that no adapter names, with Llama's structure, is not guessed in silence."""
    module = hf_model("llama")
    module.config.model_type = "something-new"
    with pytest.raises(tt.errors.ModelError, match="same names as in the adapter"):
        tt.load(module, tokenizer=byte_level())


def test_what_is_no_tokenizer() -> None:
    with pytest.raises(tt.errors.InputError, match="a dict is not a tokenizer"):
        tt.load(hf_model("llama"), tokenizer={"cat": 1})


def test_a_slow_tokenizer(folder: Path) -> None:
    from transformers import ByT5Tokenizer

    with pytest.raises(
        tt.errors.ModelError, match=r"slow tokenizer.*pass a fast one as tokenizer="
    ):
        tt.load(folder, tokenizer=ByT5Tokenizer())
    with pytest.raises(tt.errors.ModelError, match="LlamaForCausalLM has a slow tokenizer"):
        tt.load(hf_model("llama"), tokenizer=ByT5Tokenizer())


def test_a_tokenizer_from_another_folder(folder: Path, tmp_path_factory) -> None:
    bare = tmp_path_factory.mktemp("bare")
    module = hf_model("gpt2")
    module.save_pretrained(bare)
    expected = margins(tt.load(module, tokenizer=byte_level()))
    np.testing.assert_allclose(margins(tt.load(bare, tokenizer=folder)), expected, rtol=1e-5)
    np.testing.assert_array_equal(margins(tt.load(module, tokenizer=str(folder))), expected)


@pytest.mark.parametrize("loaded", [True, False])
def test_a_tokenizer_that_is_not_there(
    folder: Path, loaded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tokenizer is named, not the model, which is fine."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    model = hf_model("llama") if loaded else folder
    with pytest.raises(
        tt.errors.ModelError, match="'nobody/tokenizer' is not a folder, and"
    ) as caught:
        tt.load(model, tokenizer="nobody/tokenizer")
    assert str(folder) not in str(caught.value)


def test_an_nnsight_model_that_is_not_loaded_yet(folder: Path) -> None:
    traced = nnsight.TransformersModel(
        str(folder), task="text-generation", tokenizer=byte_level(), dispatch=False
    )
    model = tt.load(traced)
    assert model.traced is traced
    assert {p.device.type for p in model.module.parameters()} == {"cpu"}
    np.testing.assert_allclose(margins(model), margins(tt.load(folder)), rtol=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {"dtype": "bfloat16"},
        {"device_map": "cpu"},
        {"quantization": "nf4"},
        {"revision": "main"},
        {"attn_implementation": "eager"},
        {"max_memory": {0: "1GB"}},
        {"trust_remote_code": True},
    ],
    ids=lambda options: next(iter(options)),
)
def test_options_for_a_model_that_is_loaded(options: dict) -> None:
    module = hf_model("llama")
    traced = nnsight.TransformersModel(module, task="text-generation", tokenizer=byte_level())
    for model in (module, traced):
        with pytest.raises(tt.errors.InputError, match="this model is loaded already"):
            tt.load(model, tokenizer=byte_level(), **options)


def test_weights_that_the_file_lacks(folder: Path) -> None:
    """transformers would fill them with random numbers and only warn."""
    path = folder / "model.safetensors"
    weights = load_file(path)
    for name in list(weights):
        if name.startswith("model.layers.2.mlp."):
            del weights[name]
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(
        tt.errors.ModelError, match=r"no weights for model\.layers\.2\.mlp.*\(3 are absent\)"
    ):
        tt.load(folder)


def test_a_tied_unembedding_lacks_nothing(tmp_path: Path) -> None:
    module = hf_model("gpt2")
    assert module.config.tie_word_embeddings
    module.save_pretrained(tmp_path)
    byte_level().save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    np.testing.assert_allclose(
        margins(tt.load(tmp_path)), margins(tt.load(module, tokenizer=byte_level())), rtol=1e-5
    )


def test_a_shard_that_is_missing_or_cut(tmp_path: Path) -> None:
    hf_model("llama").save_pretrained(tmp_path, max_shard_size="60KB")
    byte_level().save_pretrained(tmp_path)
    shard = sorted(tmp_path.glob("*.safetensors"))[1]
    content = shard.read_bytes()
    shard.write_bytes(content[:-100])
    with pytest.raises(tt.errors.ModelError, match=r"is damaged.*copy or download it again"):
        tt.load(tmp_path)
    shard.unlink()
    with pytest.raises(tt.errors.ModelError, match=f"holds no complete model.*{shard.name}"):
        tt.load(tmp_path)


def test_weights_of_another_shape(folder: Path) -> None:
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**settings, "intermediate_size": 32}))
    with pytest.raises(tt.errors.ModelError, match=f"{folder} could not be loaded"):
        tt.load(folder)


def test_a_variant_that_the_adapter_does_not_know_in_a_folder(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = OPTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        ffn_dim=32,
        word_embed_proj_dim=16,
        vocab_size=400,
    )
    OPTForCausalLM(config).save_pretrained(tmp_path)
    byte_level().save_pretrained(tmp_path)
    with pytest.raises(tt.errors.ModelError, match="word_embed_proj_dim"):
        tt.load(tmp_path)


def test_an_adapter_without_a_factor_of_the_model_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Granite has Llama's structure and scales what it adds to the residual stream."""
    from twotower.models import registry
    from twotower.models.families.llama import Llama

    wrong = type("Llama", (Llama,), {"model_types": ("granite",)})
    monkeypatch.setattr(registry, "ADAPTERS", [wrong])
    shape = {
        "vocab_size": 400,
        "hidden_size": 48,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "attention_multiplier": 12**-0.5,
    }
    torch.manual_seed(0)
    module = GraniteForCausalLM(GraniteConfig(**shape, residual_multiplier=0.3)).eval()
    with pytest.raises(tt.errors.ModelError) as caught:
        tt.load(module, tokenizer=byte_level())
    assert isinstance(caught.value, tt.errors.CheckError)
    assert "layer 0: residual stream, attention and MLP do not sum" in str(caught.value)
    assert "at most" in str(caught.value)
    assert "adapter Llama" in str(caught.value)
    assert tt.load(module, tokenizer=byte_level(), check=False).n_layers == 2


@pytest.mark.parametrize("name", ["../nowhere", "~/nowhere", "a/b/nowhere", "/nowhere/at/all"])
def test_paths_are_not_taken_for_hub_ids(name: str) -> None:
    with pytest.raises(tt.errors.ModelError, match=f"^there is no folder {re.escape(name)}$"):
        tt.load(name)


@pytest.mark.parametrize(
    ("quantization", "layer"), [("int8", "Linear8bitLt"), ("nf4", "Linear4bit")]
)
def test_quantized_with_the_checkpoints_own_dtype(
    quantization: str, layer: str, tmp_path: Path
) -> None:
    """The layers are quantized, the unembedding is not, and the check at load passes."""
    shape = {"hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    torch.manual_seed(0)
    whole = LlamaForCausalLM(LlamaConfig(**shape, **heads, vocab_size=400))
    whole.save_pretrained(tmp_path)
    byte_level().save_pretrained(tmp_path)
    model = tt.load(tmp_path, quantization=quantization)
    assert model.quantization == quantization
    assert type(model.module.model.layers[1].self_attn.o_proj).__name__ == layer
    assert type(model.module.lm_head) is torch.nn.Linear
    # The same weights, but for their rounding; a plain model of the rounded ones agrees.
    rounded = whole.state_dict()
    for name, module in model.module.named_modules():
        if type(module).__name__ == layer:
            weight = module(torch.eye(module.in_features)).T
            original = rounded[f"{name}.weight"]
            assert 0 < (weight - original).abs().max() < 0.2 * original.abs().max()
            rounded[f"{name}.weight"] = weight
    whole.load_state_dict(rounded)
    expected = margins(tt.load(whole, tokenizer=byte_level()))
    assert np.abs(margins(model) - expected).max() < 0.05 * np.abs(expected).max()
    # A quantized module that is passed in is known for what it is.
    again = tt.load(model.module, tokenizer=byte_level())
    assert again.quantization == quantization


def test_folders_without_a_model_or_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(tt.errors.ModelError, match=r"holds no model: it has no config\.json"):
        tt.load(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(tt.errors.ModelError, match="holds no tokenizer"):
        tt.load(tmp_path)


def test_int8_says_once_that_it_casts(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    hf_model("llama").save_pretrained(tmp_path)
    byte_level().save_pretrained(tmp_path)
    model = tt.load(tmp_path, quantization="int8", check=False)
    margins(model)
    margins(model)
    said = [x for x in caplog.messages if "will be cast from torch.float32" in x]
    assert len(said) <= 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_memory": {"cpu": "1GiB"}}, "max_memory= needs device_map="),
        ({"device_map": "meta"}, "loads no weights"),
        ({"dtype": "float8_e4m3fn"}, "does not support arithmetic"),
    ],
)
def test_settings_that_load_nothing(
    settings: dict[str, Any], message: str, checkpoint: Path
) -> None:
    with pytest.raises(InputError, match=message):
        tt.load(checkpoint, **settings)


def test_the_unembedding_takes_its_input_in_one_piece(checkpoint: Path) -> None:
    """In bfloat16, torch would copy its weight for every prompt of a slice."""
    model = tt.load(checkpoint, dtype="bfloat16")
    seen: list[bool] = []
    unembedding = model.module.get_output_embeddings()
    forward = unembedding.forward
    unembedding.forward = lambda x: seen.append(x.is_contiguous()) or forward(x)
    tt.predict(model, tt.build_prompts(model, TWO, shots=1, n=3))
    assert seen
    assert all(seen)


CLASSES = {
    "LlamaModel": "it has no model.layers",
    "LlamaForSequenceClassification": "it has no lm_head",
    "LlamaForQuestionAnswering": "it has no model.layers",
    "BertForMaskedLM": "'bert' is not supported: it is an encoder",
    "T5ForConditionalGeneration": "'t5' is not supported: it is the decoder of an encoder-decoder",
    "MambaForCausalLM": "'mamba' is not supported: it has no heads that attend by softmax",
    "ViTModel": "no adapter is known for the architecture 'vit'",
}


@pytest.mark.parametrize("name", CLASSES)
def test_classes_without_heads_to_read_are_refused_with_a_reason(name: str) -> None:
    import transformers

    kind = getattr(transformers, name)
    sizes = {"hidden_size": 48, "intermediate_size": 64, "num_attention_heads": 4}
    few = {"num_hidden_layers": 1, "vocab_size": 50}
    sizes |= {"d_model": 48, "d_kv": 12, "d_ff": 64, "num_layers": 1, "num_heads": 4}
    with torch.device("meta"):
        module = kind(kind.config_class(**sizes, **few))
    with pytest.raises(tt.errors.ModelError, match=CLASSES[name]):
        tt.load(module, tokenizer=byte_level())
