"""Timing a model: what is told, and that peaks are those of their stage."""

from __future__ import annotations

import json
from mmap import PAGESIZE, mmap
from pathlib import Path

import pytest
from command import run
from tiny import hf_model

import twotower as tt
from twotower.errors import InputError
from twotower.sizing.bench import MEASURES, Peak, bench, prompts_near


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a configuration alone."""
    path = tmp_path_factory.mktemp("shape")
    hf_model("llama-grouped").config.save_pretrained(path)
    return path


def test_what_is_told(folder: Path) -> None:
    lines: list[str] = []
    found = bench(
        lambda: tt.load(folder, weights="random"),
        prompts_near,
        prompt_tokens=60,
        batch=3,
        measures=["effects", "analyze-save-open"],
        log=lines.append,
    )
    assert [line.split(":")[0] for line in lines] == [s["name"] for s in found["stages"]]
    assert found["prompts"] == 3
    assert found["heads"] == 12
    assert found["weights_bytes"] == tt.load(folder, weights="random").module.get_memory_footprint()
    assert found["tokens"] == pytest.approx(60, rel=0.3)
    for one in found["measures"].values():
        assert one["seconds_per_prompt"] == pytest.approx(12 * one["seconds_per_head"])
        assert one["tokens_per_second"] == pytest.approx(
            found["tokens"] / one["seconds_per_prompt"], rel=1e-6
        )
    assert found["measures"]["plain forward"]["forwards"] == 1


@pytest.mark.slow
def test_every_measure(folder: Path) -> None:
    found = bench(
        lambda: tt.load(folder, weights="random"),
        prompts_near,
        prompt_tokens=40,
        batch=2,
        measures=list(MEASURES),
        log=lambda line: None,
    )
    assert list(found["measures"]) == ["plain forward", *MEASURES]
    assert all(one["seconds_per_prompt"] > 0 for one in found["measures"].values())


def test_a_measure_that_is_not_known(capsys) -> None:
    with pytest.raises(InputError, match="'all' is not known; measures are effects, "):
        bench(lambda: None, prompts_near, measures=["all"])  # type: ignore[arg-type, return-value]
    assert run("bench", "llama-7b", "--weights", "random", "--measures", "all") == 2
    assert "'all' is not known" in capsys.readouterr().err


def test_a_peak_is_that_of_its_block() -> None:
    # A map of its own: a tensor may find room in memory that was freed and is still resident.
    size = 256 << 20
    with Peak() as large, mmap(-1, size) as block:
        for start in range(0, size, PAGESIZE):
            block[start] = 1
    with Peak() as small:
        pass
    assert large.bytes["cpu"] - small.bytes["cpu"] > 200 << 20


@pytest.mark.parametrize("name", ["prompt_tokens", "batch", "rounds"])
@pytest.mark.parametrize("value", [0, 1.5, True])
def test_refused(name: str, value: object) -> None:
    with pytest.raises(InputError, match=f"{name}="):
        bench(lambda: None, prompts_near, **{name: value})


def test_command(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--weights", "random", "--batch", 2, "--rounds", 1, "--prompt-tokens", 40)
    options += ("--measures", "effects")
    assert run("bench", folder, *options, "--json") == 0
    assert json.loads(capsys.readouterr().out)["prompts"] == 2
    assert run("bench", folder, *options) == 0
    assert "plain forwards" in capsys.readouterr().out
    assert run("bench", folder, "--weights", "zero") == 2
    assert "use one of random" in capsys.readouterr().err
