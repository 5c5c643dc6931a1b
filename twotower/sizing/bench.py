"""Benchmark of a model on this machine: time and memory of each stage."""

from __future__ import annotations

import gc
import platform
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import psutil
import torch

from ..errors import InputError
from ..options import set_options

if TYPE_CHECKING:
    import xarray as xr

    from ..models import Model
    from ..prompts import Prompts


Measure = Callable[["Model", "Prompts", int], object]
"""Function of a model, prompts and a batch size."""


@dataclass
class Stage:
    """One timed stage.

    Attributes
    ----------
    name
        Its name.
    seconds
        Median over rounds.
    peak_bytes
        Peak memory by device: "cpu" is the resident memory of the whole process, with
        libraries and weights; "cuda:0" is the memory allocated by tensors there.
    """

    name: str
    seconds: float
    peak_bytes: dict[str, int]


class Peak:
    """Peak memory in a `with` block, by device (except on Linux: since the process started)."""

    def __enter__(self) -> Peak:
        gc.collect()
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # resets the peak
        for index in range(torch.cuda.device_count()):
            torch.cuda.reset_peak_memory_stats(index)
        return self

    def __exit__(self, *_: object) -> None:
        self.bytes = {"cpu": most_resident()}
        for index in range(torch.cuda.device_count()):
            self.bytes[f"cuda:{index}"] = int(torch.cuda.max_memory_allocated(index))


def most_resident() -> int:
    """Return the peak of the process's resident memory.

    Read from /proc on Linux, because getrusage starts at the parent process's memory.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        line = next(x for x in status.read_text().splitlines() if x.startswith("VmHWM"))
        return 1024 * int(line.split()[1])
    import resource

    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _effects(positions: str, logprobs: bool = False) -> Measure:
    def measure(model: Model, prompts: Prompts, batch: int) -> object:
        from ..measures.effects import head_effects

        with set_options(batch_size=batch):
            return head_effects(model, prompts, positions, logprobs=logprobs)

    return measure


def _run(*groups: str) -> Callable[[Model, Prompts, int], xr.DataTree]:
    def measure(model: Model, prompts: Prompts, batch: int) -> xr.DataTree:
        from ..measures.analyze import analyze

        settings: dict[str, Any] = {"measures": groups} if groups else {}
        with set_options(batch_size=batch):
            return analyze(model, prompts, **settings)

    return measure


def _saved(model: Model, prompts: Prompts, batch: int) -> None:
    from ..results import open as opened
    from ..results import save

    with TemporaryDirectory() as folder:
        opened(save(_run()(model, prompts, batch), Path(folder) / "run.zarr")).load()


MEASURES: dict[str, Measure] = {
    "effects": _effects("last"),
    "effects-logprobs": _effects("last", logprobs=True),
    "effects-labels": _effects("labels"),
    "effects-all": _effects("all"),
    "qk-ov": _run("qk", "ov"),
    "attribution": _run("attribution"),
    "analyze": _run(),
    "analyze-save-open": _saved,
}
"""What can be timed: sweeps at the last position (margins, or also log-probabilities), at label
positions and at all positions; QK and OV; all measures, also with saving and opening."""

DEFAULT = ("effects", "analyze")


def bench(
    load: Callable[[], Model],
    build: Callable[[Model, int, int], Prompts],
    prompt_tokens: int = 32,
    batch: int = 1,
    rounds: int = 1,
    measures: Sequence[str] = DEFAULT,
    log: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Load a model, and time a plain forward and measures.

    Parameters
    ----------
    load
        Function that loads the model.
    build
        Function of the model, a length in tokens and a number; returns prompts of about
        that length.
    prompt_tokens, batch
        Tokens per prompt, and number of prompts.
    rounds
        Number of timed rounds, after one warm-up round.
    measures
        Names in `MEASURES`.
    log
        Called with a line about every stage.

    Returns
    -------
    dict
        Machine, model and `stages`; for each measure seconds per prompt and per head, cost in
        plain forwards, and tokens per second.

    Raises
    ------
    InputError
        If a number is out of range, or a measure is unknown.
    """
    from ..walk.batch_size import Batches

    for name in measures:
        if name not in MEASURES:
            raise InputError(f"{name!r} is not known; measures are {', '.join(MEASURES)}")
    for words, value in (("prompt_tokens", prompt_tokens), ("batch", batch), ("rounds", rounds)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise InputError(f"{words}={value!r} must be a whole number of at least 1")
    held: list[Model] = []
    stages = [_stage("load and check", lambda: held.append(load()), 0, log)]
    (model,) = held
    prompts = build(model, prompt_tokens, batch)
    length = float(prompts.lengths.mean())
    if abs(length - prompt_tokens) > 0.2 * prompt_tokens:
        log(f"prompts have {length:.0f} tokens, the nearest possible to {prompt_tokens}")

    def plain() -> None:
        with torch.no_grad():
            for one in Batches(model, prompts, batch):
                model.module(**one.inputs)

    stages.append(_stage("plain forward", plain, rounds, log))
    for name in measures:
        job = partial(MEASURES[name], model, prompts, batch)
        stages.append(_stage(name, job, rounds, log))
    tokens, heads = int(prompts.lengths.sum()), model.n_layers * model.n_heads
    forward = stages[1].seconds
    costs = {
        stage.name: {
            "seconds_per_prompt": stage.seconds / len(prompts),
            "seconds_per_head": stage.seconds / len(prompts) / heads,
            "forwards": stage.seconds / forward,
            "tokens_per_second": tokens / stage.seconds,
        }
        for stage in stages[1:]
    }
    return {
        "machine": _machine(),
        "model": model.name,
        "dtype": str(model.dtype).removeprefix("torch."),
        "quantization": model.quantization,
        "device_map": model.device_map,
        "heads": heads,
        "weights_bytes": weights_bytes(model),
        "prompts": len(prompts),
        "tokens": tokens / len(prompts),
        "stages": [asdict(stage) for stage in stages],
        "measures": costs,
    }


def _stage(name: str, job: Callable[[], object], rounds: int, log: Callable[[str], None]) -> Stage:
    """Time a job: once if `rounds` is 0, else the median of `rounds` after a warm-up."""
    times = []
    with Peak() as peak:
        for _ in range(rounds + 1):
            start = time.perf_counter()
            job()
            for index in range(torch.cuda.device_count()):
                torch.cuda.synchronize(index)
            times.append(time.perf_counter() - start)
    found = Stage(name, median(times[1:] or times), peak.bytes)
    most = ", ".join(f"{device} {size / 2**30:.2f} GiB" for device, size in peak.bytes.items())
    log(f"{name}: {found.seconds:.2f} s, at most {most}")
    return found


def weights_bytes(model: Model) -> int:
    """Return the bytes of all parameters and buffers as stored, without int8 and nf4 scales."""
    module: Any = model.module
    return int(module.get_memory_footprint())


def prompts_near(model: Model, tokens: int, n: int) -> Prompts:
    """Build prompts of a bundled task with about `tokens` tokens."""
    from ..prompts import build_prompts, load_task

    task = load_task("animals-cities")
    most = min(map(len, task.texts.values())) // 2 - 1
    one, two = (build_prompts(model, task, shots=shots, n=n) for shots in (1, 2))
    each = float(two.lengths.mean() - one.lengths.mean())
    shots = round(1 + (tokens - float(one.lengths.mean())) / each)
    return build_prompts(model, task, shots=min(max(shots, 1), most), n=n)


def _machine() -> dict[str, Any]:
    cards = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "memory_bytes": int(psutil.virtual_memory().total),
        "gpus": cards,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def processor() -> str:
    """Return the name of the processor, from /proc/cpuinfo if it exists."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor()
