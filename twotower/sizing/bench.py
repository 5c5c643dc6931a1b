"""What a model costs on this machine: time and memory, stage by stage."""

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
"""Takes a model, prompts and the size of a batch."""


@dataclass
class Stage:
    """One thing that was done.

    Attributes
    ----------
    name
        What it was.
    seconds
        Median over rounds.
    peak_bytes
        Most memory while it was done, by device: "cpu" is the whole process's resident
        memory, libraries and weights included; "cuda:0" what tensors hold there.
    """

    name: str
    seconds: float
    peak_bytes: dict[str, int]


class Peak:
    """Most memory inside a `with` block, by device (Linux; elsewhere of the process so far)."""

    def __enter__(self) -> Peak:
        gc.collect()
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
        for index in range(torch.cuda.device_count()):
            torch.cuda.reset_peak_memory_stats(index)
        return self

    def __exit__(self, *_: object) -> None:
        self.bytes = {"cpu": most_resident()}
        for index in range(torch.cuda.device_count()):
            self.bytes[f"cuda:{index}"] = int(torch.cuda.max_memory_allocated(index))


def most_resident() -> int:
    """Peak of the process's resident memory.

    Linux's own figure: that of getrusage begins with what the parent process held.
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
"""What can be timed: sweeps at the last position (margins, or log-probabilities as well), at
label positions and at all; both towers; everything at once, and saved and opened again."""

DEFAULT = ("effects", "analyze")


def bench(
    load: Callable[[], Model],
    build: Callable[[Model, int, int], Prompts],
    prompt_tokens: int = 32,
    batch: int = 1,
    rounds: int = 1,
    measures: Sequence[str] = DEFAULT,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Load a model, and time a plain forward and measures.

    Parameters
    ----------
    load
        Loads the model.
    build
        Takes the model, a length and a number; gives prompts of about so many tokens.
    prompt_tokens, batch
        Tokens of a prompt, and prompts.
    rounds
        How often each is timed, after one round that warms up.
    measures
        Names in `MEASURES`.
    say
        Takes a line about every stage.

    Returns
    -------
    dict
        Machine, model, `stages`, and by measure seconds per prompt and per head, plain
        forwards, and tokens per second.

    Raises
    ------
    InputError
        If a number makes no sense, or a measure is not known.
    """
    from ..walk.batch_size import Batches

    for name in measures:
        if name not in MEASURES:
            raise InputError(f"{name!r} is not known; measures are {', '.join(MEASURES)}")
    for words, value in (("prompt_tokens", prompt_tokens), ("batch", batch), ("rounds", rounds)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise InputError(f"{words}={value!r} must be a whole number of at least 1")
    held: list[Model] = []
    stages = [_stage("load and check", lambda: held.append(load()), 0, say)]
    (model,) = held
    prompts = build(model, prompt_tokens, batch)
    length = float(prompts.lengths.mean())
    if abs(length - prompt_tokens) > 0.2 * prompt_tokens:
        say(f"prompts have {length:.0f} tokens, as near to {prompt_tokens} as they can be had")

    def plain() -> None:
        with torch.no_grad():
            for one in Batches(model, prompts, batch):
                model.module(**one.inputs)

    stages.append(_stage("plain forward", plain, rounds, say))
    for name in measures:
        job = partial(MEASURES[name], model, prompts, batch)
        stages.append(_stage(name, job, rounds, say))
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


def _stage(name: str, job: Callable[[], object], rounds: int, say: Callable[[str], None]) -> Stage:
    """Do something once, and so many times more if it is to be timed warm."""
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
    say(f"{name}: {found.seconds:.2f} s, at most {most}")
    return found


def weights_bytes(model: Model) -> int:
    """Bytes of all parameters and buffers as they are stored; scales of int8 and nf4 apart."""
    module: Any = model.module
    return int(module.get_memory_footprint())


def prompts_near(model: Model, tokens: int, n: int) -> Prompts:
    """Prompts of a bundled task, of about so many tokens."""
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
    """Name of the processor, where the system tells it."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor()
