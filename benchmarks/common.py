"""What benchmarks share: the machine, fair timing, and the committed baseline."""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import torch

from twotower.models import Model
from twotower.prompts import Prompts
from twotower.sizing.bench import Peak, processor
from twotower.walk.batch_size import Batches

RESULTS = Path(__file__).parent / "results"


def arguments(description: str, name: str) -> argparse.ArgumentParser:
    """A parser of the options that all benchmarks have."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="write the results to this file")
    parser.add_argument(
        "--show-diff", action="store_true", help=f"compare with the committed results/{name}.json"
    )
    parser.add_argument(
        "--promote", action="store_true", help=f"make these results the committed {name}.json"
    )
    return parser


def machine(threads: int) -> dict[str, Any]:
    """What it ran on."""
    return {
        "processor": processor(),
        "threads": threads,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


class Memory:
    """Most memory that is held inside a `with` block, beyond what was held before it.

    On a CUDA device what tensors hold there; else the process's resident memory (Linux;
    elsewhere the peak of the whole process, which may be too little).

    Attributes
    ----------
    peak
        In bytes, once the block is over.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = str(device) if device.index is not None else device.type
        if self.device == "cuda":
            self.device = f"cuda:{torch.cuda.current_device()}"
        self.most, self.peak = Peak(), 0

    def __enter__(self) -> Memory:
        self.most.__enter__()
        if self.device.startswith("cuda"):
            self.before = torch.cuda.memory_allocated(self.device)
        else:
            self.before = psutil.Process().memory_info().rss
        return self

    def __exit__(self, *_: object) -> None:
        self.most.__exit__()
        self.peak = self.most.bytes[self.device] - self.before


def seconds(job: Callable[[], object], clock: Callable[[], float] = time.perf_counter) -> float:
    """Time of a call, by default wall time."""
    start = clock()
    job()
    return clock() - start


def ratios(
    unit: Callable[[], object],
    jobs: Mapping[str, Callable[[], object]],
    rounds: int,
    warm: bool = False,
    repeats: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[float, dict[str, float]]:
    """Median seconds of the unit, and of every job its median ratio to the unit.

    The unit is timed `repeats` times just before and just after each job, so that a change
    of the machine's speed meets both alike; the fastest of these counts. One round before
    those counted warms up, unless all is `warm`. On one thread the processor's time
    (`time.process_time`) is that of a machine without other work, but for shared caches.
    """

    def fastest() -> float:
        return min(seconds(unit, clock) for _ in range(repeats))

    units: list[float] = []
    found: dict[str, list[float]] = {name: [] for name in jobs}
    for round_ in range(warm, rounds + 1):
        before = fastest()
        for name, job in jobs.items():
            took, after = seconds(job, clock), fastest()
            if round_:
                units.append(min(before, after))
                found[name].append(took / units[-1])
            before = after
    return median(units), {name: median(times) for name, times in found.items()}


def plain_of(
    model: Model, prompts: Prompts, shared: bool = False, batch_size: int | None = None
) -> Callable[[], None]:
    """Return a plain forward of all prompts, by transformers."""

    def plain() -> None:
        with torch.no_grad():
            for batch in Batches(model, prompts, batch_size, shared=shared):
                model.module(**batch.inputs)

    return plain


def finish(result: dict[str, Any], name: str, options: argparse.Namespace) -> None:
    """Write, compare and promote, as asked."""
    committed = RESULTS / f"{name}.json"
    text = json.dumps(result, indent=1) + "\n"
    if options.show_diff:
        show_diff(json.loads(committed.read_text()), result)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(text)
    if options.promote:
        committed.parent.mkdir(exist_ok=True)
        committed.write_text(text)
        print(f"promoted to {committed.name}")


def show_diff(before: Any, after: Any, where: str = "") -> None:
    """Print every number that differs from the baseline, and by which factor."""
    if isinstance(before, dict) and isinstance(after, dict):
        for key in dict.fromkeys([*before, *after]):
            show_diff(before.get(key), after.get(key), f"{where}.{key}" if where else str(key))
    elif isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        for number, pair in enumerate(zip(before, after, strict=True)):
            show_diff(*pair, f"{where}[{number}]")
    elif before != after:
        numbers = all(isinstance(x, (int, float)) and x for x in (before, after))
        factor = f"  x {after / before:.3f}" if numbers else ""
        print(f"{where}: {before} -> {after}{factor}")
