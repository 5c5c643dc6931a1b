"""Every supported family against transformers' own forward, and what is refused, with its reason.

`make test` verifies models that together have each feature of an adapter; `make test-all` all types
and variants of tests/families.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import verify
from bad_input import MODEL, refused
from families import ALONE, CLASSES, FAMILIES, UNSUPPORTED, WRAPPERS, configuration, family_model
from tiny import THREE, byte_level
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BartConfig,
    BartForConditionalGeneration,
    EncoderDecoderConfig,
    EncoderDecoderModel,
    T5Config,
    T5ForConditionalGeneration,
)

import twotower as tt
from twotower.models.refused import REFUSED
from twotower.models.registry import ADAPTERS, find_architecture, known_types

FEATURES = {
    "gemma2": "norms before and after; softcaps of scores and logits; query factor; windows",
    "exaone4": "norms after only; QK norm per head; layers without rotary",
    "olmo2": "norms after only; QK norm of the whole width",
    "gpt_oss": "sinks; experts",
    "falcon+newalibi": "ALiBi; fused and grouped; parallel with two norms; fused attention",
    "falcon+multi": "multi-query; parallel with one norm",
    "cohere2_moe": "interleaved; logit multiplier; parallel experts; layers without rotary",
    "qwen3_next": "layers without heads; output gate; partial rotary",
    "falcon_h1": "heads and a mixer in one layer; multipliers",
    "deepseek_v3": "latent attention",
    "gemma4_text+all": "shared keys; per-layer embeddings; head sizes by layer; scaled blocks",
    "laguna": "heads by layer; a gate for each head",
    "llama4+wrapped": "multimodal wrapper; chunks; query factor by position; experts",
    "granite": "residual and logit multipliers; biases",
    "nemotron_h": "layers without MLP",
    "minicpm3": "latent attention with a residual multiplier",
}
"""What `make test` verifies, and the features that each has."""

EVERY = [*FAMILIES, *WRAPPERS]


def _parameters() -> list[Any]:
    slow = pytest.mark.slow
    return [name if name in FEATURES else pytest.param(name, marks=slow) for name in EVERY]


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("name", _parameters())
def test_every_identity(name: str) -> None:
    # A second prompt is shorter: it is padded.
    errors = verify.verified(family_model(name), n=1 if name in ALONE else 2)
    assert max(errors.values()) < verify.LARGEST, errors


@pytest.mark.usefixtures("one_thread")
def test_identities_notice_another_model() -> None:
    """A reference whose first values differ by 5 % fails each identity."""
    model = loaded(family_model("llama"))
    prompts = tt.build_prompts(model, THREE, shots=2, n=1, seed=2)
    one = verify.Reference(model, prompts, 0)
    one.module = family_model("llama")
    one.blocks = list(one.module.model.layers)
    with torch.no_grad():
        one.blocks[0].self_attn.v_proj.weight *= 1.05
    found = {
        "last": verify.knock_outs(model, prompts, [one], "last"),
        "all": verify.knock_outs(model, prompts, [one], "all"),
        "attention": verify.attention(model, prompts, [one]),
        "label logits": verify.label_logits(model, prompts, [one]),
        "edit": verify.attention_edit(model, prompts, [one]),
    }
    assert min(found.values()) > 10 * verify.LARGEST, found


def test_every_adapter_has_a_model() -> None:
    read = {configuration(name).get_text_config(decoder=True).model_type for name in EVERY}
    assert read == set(known_types())


def test_every_adapter_finds_its_parts() -> None:
    """One type of each adapter that is not verified above, without memory for weights."""
    verified = {type(find_architecture(m.config, m)) for m in map(on_meta, FEATURES)}
    read = {configuration(name).get_text_config(decoder=True).model_type: name for name in EVERY}
    for adapter in set(ADAPTERS) - verified:
        module = on_meta(read[adapter.model_types[0]])
        assert find_architecture(module.config, module).n_heads > 0


def on_meta(name: str) -> nn.Module:
    with torch.device("meta"):
        return family_model(name)


def test_every_type_is_supported_or_refused_with_a_reason() -> None:
    named = {name.partition("+")[0] for name in EVERY}
    assert not named & set(REFUSED)
    inside = {kind: kind + "_text" for kind in CLASSES}  # under the type of its language model
    unnamed = {kind for kind in set(CLASSES) - named if kind not in REFUSED}
    assert {kind for kind in unnamed if inside[kind] not in REFUSED} == set()


# ---- refused -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["mamba", "openai-gpt", "roberta", "marian", "diffllama", "zamba"])
def test_refused_types(kind: str) -> None:
    config = transformers.CONFIG_MAPPING[kind]()
    with torch.device("meta"):
        module = AutoModelForCausalLM.from_config(config)
    message = f"'{kind}' is not supported: {REFUSED[kind]}"
    refused((lambda: find_architecture(config, module), MODEL, message))


REASONS = {
    "bloom+normed": "carries the norms' outputs on",
    "bloom+exact": "set slow_but_exact to False",
    "falcon+eageralibi": "load with attn_implementation='sdpa'",
    "gpt_bigcode+cross": "layer 0's block holds .*'crossattention'",
    "opt+after": "it has no model.decoder.final_layer_norm",
    "opt+unnormed": "it has no model.decoder.final_layer_norm",
    "opt+projected": "a projection between the final norm and the unembedding",
    "xglm+cross": "layer 0's block holds .*'encoder_attn'",
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_unsupported_variants(name: str) -> None:
    refused((lambda: loaded(family_model(name)), MODEL, REASONS[name]))


def loaded(module: nn.Module) -> tt.Model:
    return tt.load(module, tokenizer=byte_level())


def with_a_part(owner: Callable[[Any], nn.Module], name: str) -> nn.Module:
    """A Llama that has an unknown part in its second block."""
    model = family_model("llama")
    setattr(owner(model.model.layers[1]), name, nn.Linear(48, 48))
    return model


def t5() -> nn.Module:
    sizes = {"d_model": 48, "d_kv": 12, "d_ff": 64, "num_layers": 2, "num_heads": 4}
    return T5ForConditionalGeneration(T5Config(vocab_size=704, **sizes))


def bart() -> nn.Module:
    sides = ("encoder", "decoder")
    layers = {f"{side}_layers": 2 for side in sides}
    heads = {f"{side}_attention_heads": 4 for side in sides}
    width = {f"{side}_ffn_dim": 64 for side in sides}
    config = BartConfig(vocab_size=704, d_model=48, **layers, **heads, **width)
    return BartForConditionalGeneration(config)


def bert_and_gpt2() -> nn.Module:
    sizes = {"num_hidden_layers": 2, "hidden_size": 48, "num_attention_heads": 4}
    encoder = transformers.BertConfig(vocab_size=704, intermediate_size=64, **sizes)
    decoder = configuration("gpt2")
    decoder.add_cross_attention = True
    both = EncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
    return EncoderDecoderModel(both)


def two_language_models() -> nn.Module:
    """Moshi writes text with one and sound with another, from the sound of two speakers."""
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 2, "head_dim": 16}
    sound = {
        "model_type": "mimi",
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_filters": 8,
        "upsampling_ratios": [2],
        "codebook_size": 32,
        "num_quantizers": 2,
        "codebook_dim": 16,
        "vector_quantization_hidden_dimension": 16,
        "upsample_groups": 32,
    }
    codes = {"num_codebooks": 2, "audio_vocab_size": 32, "vocab_size": 704}
    config = transformers.MoshiConfig(
        **codes,
        hidden_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        head_dim=12,
        ffn_dim=64,
        audio_encoder_config={**sound, **sizes},
        depth_decoder_config={**codes, **sizes, "hidden_size": 32, "ffn_dim": 32, "input_size": 48},
    )
    return transformers.MoshiForConditionalGeneration(config)


def without_heads() -> nn.Module:
    config = configuration("lfm2")
    config.layer_types = ["conv"] * config.num_hidden_layers
    return AutoModelForCausalLM.from_config(config)


def mamba() -> nn.Module:
    sizes = {"vocab_size": 704, "hidden_size": 48, "num_hidden_layers": 2}
    return AutoModelForCausalLM.from_config(transformers.MambaConfig(**sizes))


BAD: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "a part in a block": (
        lambda: with_a_part(lambda block: block, "extra"),
        r"Llama: layer 1's block holds \['extra', ",
    ),
    "a part in attention": (
        lambda: with_a_part(lambda block: block.self_attn, "q_norm"),
        "Llama: layer 1's self_attn holds .*'q_norm'",
    ),
    "T5": (t5, "'t5' is not supported: it is the decoder of an encoder-decoder"),
    "BART": (bart, "'bart' is not supported: it is the decoder of an encoder-decoder"),
    "BERT and GPT-2": (bert_and_gpt2, "layer 0's block holds .*'crossattention'"),
    "several language models": (two_language_models, "could not be run on here"),
    "a state-space model": (mamba, "'mamba' is not supported: it has no heads"),
    "no layer with heads": (without_heads, "'lfm2' with this configuration: it has no heads"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_models(name: str) -> None:
    make, message = BAD[name]
    module = make()
    refused((lambda: loaded(module), MODEL, message))


def test_code_of_a_model_does_not_run(checkpoint: Path, tmp_path: Path) -> None:
    about = json.loads((checkpoint / "config.json").read_text())
    about["model_type"] = "own"
    about["auto_map"] = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}
    for path in checkpoint.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "config.json").write_text(json.dumps(about))
    ran = tmp_path / "ran"
    (tmp_path / "code.py").write_text(f"from pathlib import Path\nPath({str(ran)!r}).touch()\n")
    message = "needs its own Python code, which is not run by default"
    refused((lambda: tt.load(tmp_path), MODEL, message))
    assert not ran.exists()
