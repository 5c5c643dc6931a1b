"""Checkpoints as users have them: formats, tokenizers, the hub's cache, what the hub refuses."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import TWO, byte_level, hf_model, sentencepiece_model, tiny

import twotower as tt
from twotower.errors import ModelError


def margins(model: tt.Model) -> np.ndarray:
    return tt.predict(model, tt.build_prompts(model, TWO, shots=2, n=3))["margin"].values


def whole(name: str, seed: int = 0) -> np.ndarray:
    return margins(tt.load(hf_model(name, seed=seed), tokenizer=byte_level()))


# ---- formats ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpt2", "gptj", "llama-grouped", "neox-parallel"])
@pytest.mark.parametrize("shards", [1, 3])
def test_torch_files(name: str, shards: int, tmp_path: Path) -> None:
    """pytorch_model.bin, whole or in shards with an index; tied weights stand there once."""
    module = hf_model(name)
    module.config.save_pretrained(tmp_path)
    byte_level().save_pretrained(tmp_path)
    state = module.state_dict()
    if module.config.tie_word_embeddings:
        del state["lm_head.weight"]
    parts = [dict(list(state.items())[i::shards]) for i in range(shards)]
    files = [f"pytorch_model-{i + 1:05}-of-{shards:05}.bin" for i in range(shards)]
    if shards == 1:
        files = ["pytorch_model.bin"]
    else:
        where = {k: file for part, file in zip(parts, files, strict=True) for k in part}
        size = {"total_size": sum(x.nbytes for x in state.values())}
        index = {"metadata": size, "weight_map": where}
        (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    for part, file in zip(parts, files, strict=True):
        torch.save(part, tmp_path / file)
    np.testing.assert_allclose(margins(tt.load(tmp_path)), whole(name), rtol=1e-5, atol=1e-6)
    (tmp_path / files[-1]).write_bytes(b"not what it was")
    with pytest.raises(tt.errors.ModelError, match=re.escape(str(tmp_path))):
        tt.load(tmp_path)


@pytest.mark.parametrize("name", ["gpt2", "gptj", "llama", "neox-parallel"])
@pytest.mark.parametrize("tied", [True, False])
def test_tied_and_untied(name: str, tied: bool, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    config = hf_model(name).config
    config.tie_word_embeddings = tied
    torch.manual_seed(0)
    module = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(4)
    embedding, unembedding = module.get_input_embeddings(), module.get_output_embeddings()
    assert (embedding.weight is unembedding.weight) == tied
    module.save_pretrained(tmp_path, max_shard_size="60KB")
    byte_level().save_pretrained(tmp_path)
    found = tt.load(tmp_path)
    assert found.config.tie_word_embeddings == tied
    expected = margins(tt.load(module, tokenizer=byte_level()))
    np.testing.assert_allclose(margins(found), expected, rtol=1e-5, atol=1e-6)


def test_a_tokenizer_of_sentencepiece(tmp_path: Path) -> None:
    """Llama's: a tokenizer.model and nothing else."""
    import sentencepiece

    hf_model("llama").save_pretrained(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model())
    about = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>"}
    about |= {"add_bos_token": True, "legacy": False}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(about))
    model = tt.load(tmp_path)
    assert model.tokenizer.is_fast
    prompts = tt.build_prompts(model, TWO, shots=2, n=3)
    assert (prompts.role[:, -prompts.lengths.min()] == "bos").any()
    pieces = sentencepiece.SentencePieceProcessor(model_proto=sentencepiece_model())
    own = prompts.token_id[0][prompts.token_id[0] >= 0]
    assert pieces.decode(own.tolist()) == prompts.strings[0]
    assert np.isfinite(tt.predict(model, prompts)["margin"]).all()


# ---- the hub's cache ----------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """A cache that holds two revisions of someone/tiny, as a download leaves them."""
    repository = tmp_path / "models--someone--tiny"
    for number, (revision, commit) in enumerate((("main", "a" * 40), ("older", "b" * 40))):
        snapshot = repository / "snapshots" / commit
        hf_model("llama", seed=number).save_pretrained(snapshot)
        byte_level().save_pretrained(snapshot)
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / revision).write_text(commit)
    return tmp_path


@pytest.mark.parametrize(
    ("revision", "commit", "seed"),
    [(None, "a", 0), ("main", "a", 0), ("older", "b", 1), ("b" * 40, "b", 1)],
)
def test_offline_from_the_cache(
    cache: Path, revision: str | None, commit: str, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    model = tt.load("someone/tiny", revision=revision, cache_dir=str(cache))
    assert model.name == "someone/tiny"
    assert model.revision == commit * 40
    np.testing.assert_allclose(margins(model), whole("llama", seed), rtol=1e-5, atol=1e-6)
    answers = tt.predict(model, tt.build_prompts(model, TWO, shots=1, n=2))
    assert answers.attrs["model_revision"] == commit * 40


def test_a_revision_that_is_not_there(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(tt.errors.ModelError, match=r"someone/tiny \(revision v9\)"):
        tt.load("someone/tiny", revision="v9", cache_dir=str(cache))


def test_shards_that_were_not_downloaded(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for file in cache.rglob("model.safetensors"):
        file.unlink()
    with pytest.raises(tt.errors.ModelError, match="someone/tiny"):
        tt.load("someone/tiny", cache_dir=str(cache))


# ---- what the hub says --------------------------------------------------------------------


class Hub(BaseHTTPRequestHandler):
    """A hub that has nothing for us."""

    def do_HEAD(self) -> None:
        answers = {"gated": (403, "GatedRepo"), "missing": (404, "RepoNotFound")}
        status, code = next(x for name, x in answers.items() if name in self.path)
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", "said by the hub")
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_GET = do_HEAD

    def log_message(self, *arguments: Any) -> None:
        pass


@pytest.fixture(scope="module")
def hub() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("someone/gated-model", "is gated: request access on its page, and log in"),
        pytest.param(
            "someone/missing-model",
            "there is no 'someone/missing-model' on the hub",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_refused_by_the_hub(name: str, message: str, hub: str, tmp_path: Path) -> None:
    code = f"import twotower as tt; tt.load({name!r})"
    environment = {
        "HF_ENDPOINT": hub,
        "HF_HOME": str(tmp_path),
        "PATH": "",
        "NO_PROXY": "127.0.0.1",
    }
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("twotower.errors.ModelError")
    assert message in last


# ---- configurations that do not fit -------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "lie"),
    [
        ("llama", {"num_attention_heads": 6}),
        ("llama-grouped", {"num_key_value_heads": 4}),
        ("llama", {"num_hidden_layers": 4}),
        ("gptj", {"n_embd": 64}),
        ("gptj", {"rotary_dim": 64}),
        ("gpt2", {"n_head": 5}),
        ("neox-parallel", {"num_attention_heads": 5}),
    ],
    ids=str,
)
def test_a_configuration_that_lies(name: str, lie: dict[str, int], tmp_path: Path) -> None:
    hf_model(name).save_pretrained(tmp_path)
    byte_level().save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**settings, **lie}))
    with pytest.raises(tt.errors.ModelError, match=re.escape(str(tmp_path))) as caught:
        tt.load(tmp_path)
    assert len(str(caught.value)) < 700


def test_a_shape_without_weights() -> None:
    with pytest.raises(
        tt.errors.ModelError, match=r"only a shape here: load\(.*weights='random'\)"
    ):
        tt.load("llama-7b")


def test_nothing_is_left_of_a_load_that_failed(tmp_path: Path) -> None:
    """Offloaded to disk, with a shard that is cut: what was written before is gone."""
    source, offload = tmp_path / "model", tmp_path / "offload"
    hf_model("llama").save_pretrained(source, max_shard_size="60KB")
    byte_level().save_pretrained(source)
    shard = sorted(source.glob("*.safetensors"))[-1]
    shard.write_bytes(shard.read_bytes()[:-100])
    device_map = {"model.embed_tokens": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
    device_map |= {"model.rotary_emb": "cpu", "model.layers.0": "cpu"}
    device_map |= {"model.layers.1": "disk", "model.layers.2": "disk"}
    with pytest.raises(tt.errors.ModelError, match="is damaged"):
        tt.load(source, device_map=device_map, offload_folder=str(offload))
    assert not list(offload.glob("*"))
    shutil.rmtree(source)
    assert margins(tiny("llama")).shape == (3,)


@pytest.mark.parametrize(
    ("kind", "lie"),
    [
        ("llama", {"num_hidden_layers": 1}),
        ("qwen2", {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}),
        ("qwen3", {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}),
    ],
)
def test_weights_that_the_configuration_has_no_place_for(
    kind: str, lie: dict[str, Any], tmp_path: Path
) -> None:
    """transformers would leave them out, and the model would be another one."""
    hf_model(kind).save_pretrained(tmp_path)
    byte_level().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **lie}))
    with pytest.raises(ModelError, match=r"fit its config.json: model\.layers\.\d.*another model"):
        tt.load(tmp_path)


def test_buffers_of_old_files_are_no_weights() -> None:
    of_a_layer = tiny("llama").architecture.of_a_layer
    assert of_a_layer("model.layers.3.self_attn.q_proj.bias")
    assert not of_a_layer("model.layers.3.self_attn.rotary_emb.inv_freq")
    assert not of_a_layer("score.weight")
    assert not tiny("gpt2").architecture.of_a_layer("h.3.attn.bias")
