"""Models on a server: every measure and edit gives what it gives here, and no weights are read.

The server (see `server`) is another process that lacks this package and xarray; what is sent and
returned goes over HTTP and a websocket as nnsight's own client does it.
"""

from __future__ import annotations

import importlib
import json
import pkgutil
import subprocess
import sys
import urllib.request
from collections.abc import Collection, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import nnsight
import pytest
import torch
from nnsight.intervention.serialization import dumps
from surface import MEASURES, REPEATED, edits, same, under
from tiny import (
    ARCHITECTURES,
    MIXED,
    THREE,
    byte_level,
    crossed,
    hf_model,
    mixed,
    tiny,
)

import twotower as tt
from twotower.errors import ModelError
from twotower.models.remote import prepare, reached


class Server:
    """A server in another process, with checkpoints of some architectures."""

    def __init__(self, folder: Path, names: Collection[str]) -> None:
        for name in names:
            hf_model(name).save_pretrained(folder / name)
            byte_level().save_pretrained(folder / name)
        self.folder = folder
        file = Path(__file__).parents[1] / "server.py"
        command = [sys.executable, str(file), *(str(folder / name) for name in names)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        self.address = f"http://127.0.0.1:{int(self.process.stdout.readline())}"
        for name in names:  # the client reads nothing but configuration and tokenizer
            (folder / name / "model.safetensors").unlink()

    @cache  # noqa: B019 (lives as long as the module)
    def model(self, name: str) -> tt.Model:
        return tt.load(self.folder / name, remote=self.address)

    def jobs(self) -> list[dict[str, Any]]:
        with urllib.request.urlopen(f"{self.address}/jobs") as answer:
            return json.load(answer)


@pytest.fixture(scope="module")
def server(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    own = (x for x in request.session.items if x.path == request.path)
    asked = [x.callspec.params for x in own if hasattr(x, "callspec")]
    known = (*ARCHITECTURES, *MIXED)
    names = {"gpt2", "llama", "llama-grouped"}
    names |= {x["name"] for x in asked if x.get("name") in known}
    folder, threads = tmp_path_factory.mktemp("checkpoints"), torch.get_num_threads()
    torch.set_num_threads(1)  # as on the server, since sums are rounded otherwise
    with pytest.MonkeyPatch.context() as patch:
        # nnsight asks the hub how an id is spelled.
        spelled = {str(folder / name): str(folder / name) for name in names}
        patch.setattr("nnsight.modeling.huggingface._ID_CACHE", spelled)
        patch.setattr(nnsight.CONFIG.APP, "REMOTE_LOGGING", False)
        found = Server(folder, names)
        with found.process:  # closes its pipe and waits
            yield found
            found.process.kill()
    torch.set_num_threads(threads)


def classes(package: str) -> list[type]:
    """Classes that the modules of a package define."""
    within = importlib.import_module(package).__path__
    modules = [importlib.import_module(f"{package}.{m.name}") for m in pkgutil.iter_modules(within)]
    return [
        found
        for module in modules
        for found in vars(module).values()
        if isinstance(found, type) and found.__module__ == module.__name__
    ]


@pytest.mark.parametrize("package", ["walk", "sweep", "edits", "measures"])
def test_every_class_can_be_sent(package: str) -> None:
    found = classes(f"twotower.{package}")
    assert len(found) > 5
    prepare("local")
    assert dumps(found)


@cache
def prompts(name: str, n: int = 3) -> tt.Prompts:
    return tt.build_prompts(tiny(name), THREE, shots=1, n=n, seed=2)


@pytest.mark.parametrize(
    ("name", "what"), crossed(MEASURES, ("analyze", "edits"), ("gpt2",), REPEATED)
)
def test_as_here(name: str, what: str, server: Server) -> None:
    model = server.model(name)
    expected = MEASURES[what](tiny(name), prompts(name))
    same(MEASURES[what](model, prompts(name)), expected, 1e-5)


@pytest.mark.parametrize("name", mixed())
def test_mixers(name: str, server: Server) -> None:
    expected = MEASURES["last"](tiny(name), prompts(name))
    same(MEASURES["last"](server.model(name), prompts(name)), expected, 1e-5)


def test_completions(server: Server) -> None:
    model, here, given = server.model("llama-grouped"), tiny("llama-grouped"), prompts("gpt2")
    for edit in ([], tt.KnockOut([(1, 2)]), tt.KnockOut([(1, 2)], to=tt.From(given))):
        found = tt.complete(model, given, 3, edit)
        assert found == tt.complete(here, given, 3, edit)
        assert any(found)


def test_no_weights_are_read(server: Server) -> None:
    model = server.model("gpt2")
    tt.analyze(model, prompts("gpt2"))
    assert not model.traced.dispatched
    assert {x.device.type for x in model.module.parameters()} == {"meta"}


def test_a_batch_is_one_job(server: Server) -> None:
    """Edits whose donors have forwards of their own, too; what they give stays there."""
    model, given = server.model("llama"), prompts("llama", 4)
    tt.analyze(model, given)
    twin = given.reversed_labels()
    patches = [
        tt.KnockOut([(0, 1)], to=tt.From(twin)),
        tt.Patch([(0, 1)], twin, "values"),
    ]
    calls = {
        "analyze": lambda: under(tt.analyze, model, given, batch_size=2),
        "patch": lambda: under(tt.head_effects, model, given, batch_size=2, to=tt.From(twin)),
        "edits": lambda: under(tt.predict, model, given, patches, batch_size=2),
    }
    for name, call in calls.items():
        before = len(server.jobs())
        call()
        jobs = server.jobs()[before:]
        assert len(jobs) == 2, name
        assert max(job["sent"] for job in jobs) < 200_000, name


def test_the_check_is_one_job(server: Server) -> None:
    before = len(server.jobs())
    tt.load(server.folder / "gpt2", remote=server.address)
    assert len(server.jobs()) == before + 1


def test_a_model_that_does_not_fit_is_refused(server: Server, monkeypatch: Any) -> None:
    from twotower.models import registry
    from twotower.models.families.llama import Llama

    # A class of its own: the server would keep what is patched into Llama.
    wrong = type("WrongLlama", (Llama,), {"scaling": lambda self, layer: 1.0})
    monkeypatch.setattr(registry, "ADAPTERS", [wrong])
    with pytest.raises(tt.errors.CheckError, match="recomputed attention does not give"):
        tt.load(server.folder / "llama", remote=server.address)


@pytest.mark.parametrize("batch_size", [None, 4])
def test_a_server_that_runs_out_of_memory(
    server: Server, batch_size: int | None, monkeypatch: Any
) -> None:
    """Half the prompts come again."""
    from twotower.measures.predictions import PredictionsRecorder

    finish = PredictionsRecorder.finish

    def limited(self: Any, end: Any) -> Any:
        if len(end.logits) > 2:
            raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return finish(self, end)

    model, given = server.model("llama"), prompts("llama", 4)
    expected = tt.predict(model, given)
    monkeypatch.setattr(PredictionsRecorder, "finish", limited)
    model.cache.clear()
    same(under(tt.predict, model, given, batch_size=batch_size), expected, 1e-5)


def test_nobody_answers(server: Server) -> None:
    with pytest.raises(tt.errors.ModelError, match=r"could not be run on http://127\.0\.0\.1:1: "):
        tt.load(server.folder / "llama", remote="http://127.0.0.1:1")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"remote": "somewhere"}, "must be True, or the address of a server"),
        ({"quantization": "nf4"}, "quantization: not possible with remote="),
        ({"dtype": "bfloat16", "device_map": "auto"}, "device_map, dtype: not possible"),
        ({"weights": "random"}, "random weights are made locally"),
    ],
)
def test_what_is_up_to_the_server(server: Server, options: Any, message: str) -> None:
    with pytest.raises(tt.errors.InputError, match=message):
        tt.load(server.folder / "llama", **({"remote": server.address} | options))


def test_the_demo_model_is_not_on_a_server() -> None:
    with pytest.raises(tt.errors.InputError, match="is not on a server"):
        tt.load("smollm2-135m", remote=True)


@pytest.mark.parametrize(
    "name", [pytest.param(x, marks=() if x == "gptj" else pytest.mark.slow) for x in ARCHITECTURES]
)
def test_nnsights_own_simulation(name: str) -> None:
    """Sent and received within this process, on a model that is here."""
    module = hf_model(name)
    model = tt.load(module, tokenizer=byte_level(), remote="local")
    given = prompts(name)
    same(tt.analyze(model, given), tt.analyze(tiny(name), given), 1e-5)
    found = tt.predict(model, given, edits(model, given))
    same(found, tt.predict(tiny(name), given, edits(tiny(name), given)), 1e-5)


def test_a_server_that_is_gone() -> None:
    refused = ConnectionRefusedError("refused")
    words = "http://here cannot be reached: ConnectionRefusedError"
    with pytest.raises(ModelError, match=words), reached("http://here"):
        raise refused
    with pytest.raises(ConnectionRefusedError), reached(False):
        raise refused
