"""The benchmarks' floors count what a forward really multiplies, and their page is current."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from tiny import TWO, tiny
from torch.utils.flop_counter import FlopCounterMode

import twotower as tt
from twotower.sweep.prepare import prepare_sweep
from twotower.walk.batch import make_batch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def floors(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import floors

    return floors


def counted(job) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        job()
    return counter.get_total_flops()


PLAIN = ("gpt2", "gptj", "llama-grouped", "neox-parallel")
FURTHER = ("gemma2", "bloom", "minicpm3", "lfm2")  # windows, fused, latent, convolutions


@pytest.mark.parametrize("name", [*PLAIN, *FURTHER])
def test_the_floor_of_a_plain_forward_is_what_it_multiplies(floors: ModuleType, name: str) -> None:
    model = tiny(name)
    prompts = tt.build_prompts(model, TWO, shots=3, n=1)
    n, batch = prompts.n_positions, make_batch(model, prompts, [0])
    floor = floors.Floor(model)
    # The eager kernel multiplies masked pairs of positions, too.
    masked = sum(layer.pair * n * n - layer.seen(n) for layer in floor.layers)
    expected = floor.plain(n) + masked
    assert counted(lambda: model.module(**batch.inputs)) == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("name", ["gpt2", "gptj", "llama-grouped"])
def test_the_floor_of_a_sweep_is_near_what_it_multiplies(floors: ModuleType, name: str) -> None:
    model = tiny(name)
    prompts = tt.build_prompts(model, TWO, shots=3, n=1)
    n, batch = prompts.n_positions, make_batch(model, prompts, [0])
    floor = floors.Floor(model)
    pairs = [(a, b) for i, a in enumerate(model.heads) for b in model.heads[i + 1 :]]
    clean = counted(lambda: model.module(**batch.inputs))
    for groups in (None, [(head,) for head in model.heads] + pairs):
        maker = prepare_sweep(model, prompts, groups=groups)
        swept = counted(lambda maker=maker: floors.bare(model, batch, [maker(batch)]))
        rows = swept - clean
        least = floor.rows(n, 1, groups)
        assert least * 0.99 <= rows <= 1.3 * least, (rows, least)


def test_a_pair_costs_no_more_than_its_own_rows(floors: ModuleType) -> None:
    model = tiny("llama")
    floor, top = floors.Floor(model), model.n_layers - 1
    low, high = tt.Head(0, 0), tt.Head(top, 0)
    both = floor.rows(20, 1, [(low,), (low, high)])
    one = floor.rows(20, 1, [(low,)])
    last = floor.layers[top]
    assert both - one == last.projecting + last.mlp  # it shares all but the last block's output


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """The GPU's script, as called from the command line."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import gpu

    def call(*arguments: str) -> None:
        monkeypatch.setattr(sys, "argv", ["gpu.py", *arguments])
        gpu.main()

    threads = torch.get_num_threads()
    yield call
    torch.set_num_threads(threads)


@pytest.mark.slow
def test_the_gpu_script_runs_on_a_small_model(gpu: Callable[..., None], tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    gpu(
        *("--device", "cpu", "--shape", "tiny", "--rounds", "1", "--batch-size", "2"),
        *("--threads", "1", "--out", str(out)),
    )
    found = json.loads(out.read_text())["shapes"]["tiny"]
    assert found["heads"] == 12
    names = {"plain forward", "head effects, margins", "analyze"}
    assert {row["measure"] for row in found["measures"]} == names
    assert all(0 < row["share_of_peak"] < 1 for row in found["measures"])
    assert len({row["tokens"] for row in found["measures"]}) == 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_the_gpu_script_says_that_there_is_no_gpu(gpu: Callable[..., None], capsys) -> None:
    with pytest.raises(SystemExit) as stopped:
        gpu("--promote")
    assert stopped.value.code == 2
    said = capsys.readouterr()
    assert said.err.strip() == "there is no GPU here: nothing was measured"
    assert not said.out


def test_large_models_kept_to_their_memory() -> None:
    """In the committed run: below the limit, and within a tenth of what was planned."""
    found = json.loads((BENCHMARKS / "results" / "large_models.json").read_text())["models"]
    assert len(found) == 3
    for one in found.values():
        assert one["peak_bytes"] <= 1.25 * one["weights_bytes"] + 1.5 * 2**30
        assert one["planned_bytes"] == pytest.approx(one["peak_bytes"], rel=0.1)


def test_runs_on_many_workers_kept_to_their_limits() -> None:
    """In the committed run: near twice as fast with two workers, little for driver and store."""
    found = json.loads((BENCHMARKS / "results" / "scale.json").read_text())
    assert found["speedup_of_two"] >= 1.85
    for one in found["measured"].values():
        assert one["driver_share"] <= 0.02
        assert one["writing_share"] <= 0.03


def test_a_simulated_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against what can be said without simulating."""
    pytest.importorskip("ray")
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from scale import Cluster

    free = Cluster((2.0,), driver=0.0, size=0.0, bandwidth=1.0)
    assert free.seconds(4, 40) == pytest.approx(20.0)
    store = Cluster((2.0,), driver=0.0, size=5.0, bandwidth=5.0)
    assert store.seconds(1, 10) == pytest.approx(30.0)  # nobody to wait for
    assert store.seconds(100, 1000) == pytest.approx(1000, rel=0.01)  # one second each
    driver = Cluster((2.0,), driver=0.5, size=0.0, bandwidth=1.0)
    assert driver.seconds(100, 1000) == pytest.approx(500, rel=0.02)


def test_the_page_is_that_of_the_results(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import tables

    assert (BENCHMARKS / "README.md").read_text(encoding="utf-8") == tables.page()
