"""Plans of memory: against models that are loaded, against measured peaks, and what is said."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import pytest
from command import run
from tiny import wide_config

import twotower as tt
from twotower.errors import InputError, ModelError
from twotower.sizing.plan import _Counter, _device, make_plan
from twotower.sizing.shape import Shape
from twotower.sizing.table import ranges

GIB = 1 << 30


@pytest.fixture(autouse=True, scope="module")
def _summed_once() -> Iterator[None]:
    """A model's bytes are summed once; transformers does so for every placement that is tried."""
    from transformers.integrations import accelerate

    total, known = accelerate.compute_module_sizes, WeakKeyDictionary[Any, Any]()

    def once(model: Any, quantizer: Any = None, *rest: Any, **options: Any) -> Any:
        found = known.setdefault(model, {})
        key = (id(quantizer), rest, tuple(options.items()))
        if key not in found:
            found[key] = total(model, quantizer, *rest, **options)
        return tuple(sizes.copy() for sizes in found[key])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(accelerate, "compute_module_sizes", once)
        yield


@pytest.mark.parametrize(
    ("name", "quantization"),
    [
        ("gpt2", "int8"),
        ("gptj", None),
        ("llama-grouped", "nf4"),
        ("neox-parallel", None),
        *(
            pytest.param(name, quantization, marks=pytest.mark.slow)
            for name, quantization in (
                *(("gpt2", None), ("gpt2", "nf4"), ("gptj", "int8"), ("gptj", "nf4")),
                *(("llama-grouped", None), ("llama-grouped", "int8")),
                *(("neox-parallel", "int8"), ("neox-parallel", "nf4")),
            )
        ),
    ],
)
def test_weights_are_those_of_a_loaded_model(
    name: str, quantization: str | None, tmp_path: Path
) -> None:
    wide_config(name, 256).save_pretrained(tmp_path)
    model = tt.load(
        tmp_path, weights="random", dtype="float32", quantization=quantization, check=False
    )
    settings = {"dtype": "float32", "quantization": quantization, "prompt_tokens": 50}
    (part,) = make_plan(str(tmp_path), **settings).parts
    # nf4's and int8's scales are the model's own state, but not in its footprint.
    scales = {None: 1.0, "int8": 1.02, "nf4": 1.04}[quantization]
    size = model.module.get_memory_footprint()
    assert size * 0.999 <= part.weights <= size * scales, (size, part.weights)


def test_llama_by_hand() -> None:
    (part,) = make_plan("llama-7b", cpu="64GiB").parts
    assert part.weights == pytest.approx(2 * 6.738e9, rel=1e-3)
    assert part.layers == list(range(32))
    nf4 = make_plan("llama-7b", cpu="64GiB", quantization="nf4").parts[0].weights
    linear, rest = 6.476e9, 2 * 32000 * 4096 + 65 * 4096
    assert nf4 == pytest.approx(linear * (0.5 + 1 / 64) + 2 * rest, rel=2e-3)


def test_layers_over_gpus() -> None:
    found = make_plan("llama-7b", gpus=["8GiB", "8GiB", "8GiB"], cpu="64GiB")
    layers = [part.layers for part in found.parts if part.device.startswith("cuda")]
    assert list(chain(*layers)) == list(range(32))
    assert all(layers)
    assert found.fits
    assert set(found.max_memory) == {0, 1, 2, "cpu"}
    assert all(part.total <= part.limit for part in found.parts)


def test_what_is_measured_has_room_beside_the_weights() -> None:
    small = make_plan("llama-7b", gpus=["8GiB"], cpu="32GiB", batch=1, prompt_tokens=50)
    large = make_plan("llama-7b", gpus=["8GiB"], cpu="32GiB", batch=8, prompt_tokens=500)
    assert small.fits
    assert large.fits
    assert len(small.parts[0].layers) > len(large.parts[0].layers)
    assert large.parts[0].activations > small.parts[0].activations


def test_the_largest_batch_is_the_largest() -> None:
    most = make_plan("llama-7b", gpus=["24GiB"], cpu="64GiB").largest_batch
    assert most > 8
    fits = [
        make_plan("llama-7b", gpus=["24GiB"], cpu="64GiB", batch=n).parts[0].fits
        for n in (most, most + 1)
    ]
    # More room for batches moves layers to the CPU, so that more fits than before.
    assert fits[0]


def test_what_does_not_fit() -> None:
    found = make_plan("llama-7b", cpu="8GiB")
    assert not found.fits
    assert found.largest_batch == 0
    assert any("nf4" in words for words in found.advice)
    assert any("the weights alone take 12.55GiB" in words for words in found.advice)
    many = make_plan("llama-7b", cpu="20GiB", batch=2000)
    assert not many.fits
    assert many.advice == [f"take --batch {many.largest_batch}"]
    assert 0 < many.largest_batch < 2000
    offloaded = make_plan("llama-7b", gpus=["3GiB"], cpu="64GiB", quantization="nf4")
    assert not offloaded.fits
    assert "cannot be offloaded" in offloaded.advice[0]


def test_offloaded_weights_come_to_the_first_gpu() -> None:
    found = make_plan("llama-7b", gpus=["8GiB"], cpu="32GiB", batch=1, prompt_tokens=20)
    gpu, cpu = found.parts
    assert cpu.layers
    layer = 2 * 32 * (4 * 4096**2 + 3 * 4096 * 11008) / 32
    assert gpu.activations > layer  # room for the layer that is computed


PEAK = """
import sys
import torch
torch.set_num_threads(1)
import twotower as tt
shots, batch, n = map(int, sys.argv[1:])
model = tt.load("smollm2-135m", dtype="float32", check=False)
prompts = tt.build_prompts(model, tt.load_task("animals-cities"), shots=shots, n=n)
with tt.set_options(batch_size=batch):
    tt.analyze(model, prompts)
from twotower.sizing.bench import most_resident
print(prompts.n_positions, most_resident())
"""


@pytest.mark.demo_model
@pytest.mark.parametrize(
    ("shots", "batch", "n"),
    [
        pytest.param(5, 4, 4, marks=pytest.mark.slow),
        pytest.param(10, 4, 4, marks=pytest.mark.slow),
        pytest.param(10, 2, 8, marks=pytest.mark.slow),
        pytest.param(10, 8, 8, marks=pytest.mark.slow),
        pytest.param(3, 16, 32, marks=pytest.mark.slow),
        pytest.param(5, 32, 64, marks=pytest.mark.slow),
    ],
)
def test_predicted_peak(demo_model: tt.Model, shots: int, batch: int, n: int) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PEAK, *map(str, (shots, batch, n))],
        capture_output=True,
        text=True,
        check=True,
    )
    tokens, peak = map(int, done.stdout.split())
    (part,) = make_plan(
        "smollm2-135m", dtype="float32", prompt_tokens=tokens, batch=batch, prompts=n
    ).parts
    assert part.total == pytest.approx(peak, rel=0.1)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"batch": 0}, "batch=0 must be"),
        ({"prompt_tokens": 2.5}, "prompt_tokens=2.5"),
        ({"prompts": True}, "prompts=True"),
        ({"keep": "some"}, "keep='some'"),
        ({"gpus": ["lots"]}, "gpu='lots'"),
        ({"cpu": "-1GiB"}, "cpu='-1GiB'"),
        ({"dtype": "float33"}, "float33"),
        ({"quantization": "int3"}, "int3"),
        ({"gpus": ["8GiB"], "device_map": "cuda:0"}, "device_map='cuda:0'"),
    ],
)
def test_refused(options: dict, words: str) -> None:
    with pytest.raises(InputError, match=words):
        make_plan("llama-7b", **options)


def test_no_such_model(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no folder"):
        make_plan(str(tmp_path / "none"))


def test_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("plan", "llama-7b", "--gpu", "24GiB", "--gpu", "24GiB", "--cpu", "64GiB") == 0
    out = capsys.readouterr().out
    assert "cuda:1" in out
    assert "It fits" in out
    assert run("plan", "gpt-j-6b", "--cpu", "24GiB", "--quantization", "nf4", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["fits"]
    assert found["parts"][0]["weights"] == pytest.approx(3.49 * GIB, rel=0.01)


def test_command_says_what_to_change(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("plan", "llama-7b", "--gpu", "4GiB", "--cpu", "4GiB") == 1
    found = capsys.readouterr()
    assert "It does not fit" in found.out
    assert "does not fit: " in found.err


def test_ranges() -> None:
    assert ranges([0, 1, 2, 5, 7, 8]) == "0-2, 5, 7-8"
    assert ranges([]) == ""


MIXED = [
    pytest.param(("8GiB",), "nf4", 8, marks=pytest.mark.slow),
    pytest.param(("6GiB",), "nf4", 4, marks=pytest.mark.slow),
    pytest.param(("12GiB", "6GiB"), None, 16, marks=pytest.mark.slow),
    (("8GiB", "8GiB"), None, 16),
    pytest.param(("10GiB", "10GiB"), None, 16, marks=pytest.mark.slow),
    pytest.param(("24GiB",), None, 500, marks=pytest.mark.slow),
    (("0.5GiB", "24GiB"), None, 8),
]


@pytest.mark.parametrize(("gpus", "quantization", "batch"), MIXED)
def test_a_plan_keeps_what_it_says(
    gpus: tuple[str, ...], quantization: str | None, batch: int
) -> None:
    """Its advice fits, one more does not, and its `max_memory` gives its placement."""
    given = {"gpus": gpus, "cpu": "64GiB", "quantization": quantization}
    found = make_plan("llama-7b", batch=batch, **given)
    if found.largest_batch:
        assert make_plan("llama-7b", batch=found.largest_batch, **given).fits
    if found.largest_batch_on_gpus:
        inside = make_plan("llama-7b", batch=found.largest_batch_on_gpus, **given)
        assert inside.fits
        assert all(part.device != "cpu" or not part.layers for part in inside.parts)
    if not found.fits and found.largest_batch:
        assert found.advice == [f"take --batch {found.largest_batch}"]
    again = Shape("llama-7b", None, quantization, None).place(found.max_memory, "auto")
    assert {name: _device(at) for name, at in again.items()} == found.device_map


def test_longer_than_the_context() -> None:
    with pytest.raises(InputError, match="gpt2-large takes at most 1024"):
        make_plan("gpt2-large", prompt_tokens=1025)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"gpus": ["infGiB"]}, "must be a number of bytes"),
        ({"device_map": "cuda:0"}, "plans do not support"),
        ({"dtype": "float8_e4m3fn"}, "does not support arithmetic"),
    ],
)
def test_what_cannot_be_planned(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make_plan("llama-7b", **settings)


def test_bytes_as_digits() -> None:
    plain, named = (make_plan("llama-7b", gpus=[size]) for size in ("25769803776", "24GiB"))
    assert plain.parts == named.parts


def test_an_unembedding_that_is_moved_away_comes_back() -> None:
    """Where it lies on the CPU, the GPU needs room for it, not for the largest layer alone."""
    shape = Shape("gpt-j-6b", None, None, None)
    limits = {0: 24 << 30, "cpu": 64 << 30}
    placed = {"transformer": 0, "lm_head": "cpu"}
    there = {"transformer": 0, "lm_head": 0}
    away, near = (
        _Counter(shape, where, limits, 100, 10, "all").parts(1)[0] for where in (placed, there)
    )
    unembedding = near.weights - away.weights
    assert unembedding == 2 * (50400 * 4096 + 50400)
    assert away.activations - near.activations == unembedding


def test_advice_is_what_would_help() -> None:
    """What is asked already is not advised."""
    short = {"cpu": "1GiB", "prompt_tokens": 50, "keep": "labels"}
    wide = make_plan("llama-7b", dtype="float32", **short).advice
    assert [words.split()[0] for words in wide] == ["--dtype", "--quantization", "the"]
    half = make_plan("llama-7b", dtype="bfloat16", **short).advice
    assert [words.split()[0] for words in half] == ["--quantization", "the"]
    eight = make_plan("llama-7b", quantization="int8", **short).advice
    assert eight[0] == "--quantization nf4 takes about half"
    four = make_plan("llama-7b", quantization="nf4", **short).advice
    assert [words.split()[0] for words in four] == ["the"]
    long = make_plan("llama-7b", quantization="nf4", cpu="1GiB").advice
    assert [words.split()[0] for words in long] == ["the", "take", "--keep"]
