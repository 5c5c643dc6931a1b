"""Models of seven billion parameters on a GPU: time, memory, share of the card's peak.

Random weights in the shapes of Llama-7B and GPT-J, made on the card, in bfloat16. The card's
peak is measured too, as one large product of matrices; a measure's share of it counts the
multiplications of its floor (see `floors.py`).

    python benchmarks/gpu.py --promote
    python benchmarks/gpu.py --device cpu --shape tiny    # tries the script itself
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from statistics import median
from typing import Any

import common
import floors
import shapes
import torch

import twotower as tt
from twotower.models import Model
from twotower.models.load import load_config

SHAPES: dict[str, Callable[[], Any]] = {
    "llama-7b": lambda: load_config("llama-7b"),
    "gpt-j-6b": lambda: load_config("gpt-j-6b"),
    "tiny": lambda: shapes.llama(3, 4, 64, 128, shapes.SMALL_VOCABULARY),
}
LARGE = ("llama-7b", "gpt-j-6b")
LENGTHS = (100, 500)


def finished(device: str) -> None:
    """Wait for the device."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def timed(job: Callable[[], object], device: str, rounds: int) -> float:
    """Median seconds of a call, after one that warms up."""

    def whole() -> None:
        job()
        finished(device)

    whole()
    return median(common.seconds(whole) for _ in range(rounds))


def matrix_peak(device: str, dtype: torch.dtype) -> float:
    """Operations a second in a large product of matrices."""
    size = 8192 if device.startswith("cuda") else 1024
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return 2 * size**3 / min(timed(lambda: a @ b, device, 5) for _ in range(3))


def measures(
    model: Model, device: str, length: int, options: Any, peak: float
) -> list[dict[str, Any]]:
    """A plain forward, the sweep and all measures of prompts of about a length."""
    size = options.batch_size
    prompts = shapes.prompts_near(model, length, size)
    mean, heads = float(prompts.lengths.mean()), len(model.heads)
    parts = floors.Floor(model).parts(mean, len(prompts.labels))
    forward, sweep = parts["clean forward"], parts["sweep"]
    jobs = {
        "plain forward": (common.plain_of(model, prompts, batch_size=size), forward),
        "head effects, margins": (
            lambda: tt.head_effects(model, prompts, logprobs=False),
            forward + sweep,
        ),
        "analyze": (lambda: tt.analyze(model, prompts), sum(parts.values())),
    }
    rows = []
    for name, (job, operations) in jobs.items():
        with tt.set_options(batch_size=size), common.Memory(model.device) as memory:
            took = timed(job, device, options.rounds) / len(prompts)
        row = {
            "measure": name,
            "tokens": round(mean, 1),
            "batch_size": size,
            "seconds_per_prompt": float(f"{took:.4g}"),
            "share_of_peak": round(operations / took / peak, 4),
            "peak_GiB_above_weights": round(memory.peak / 2**30, 3),
        }
        if name != "plain forward":
            row["seconds_per_head"] = float(f"{took / heads:.4g}")
            row["forwards"] = round(took / rows[0]["seconds_per_prompt"], 3)
        print(row, flush=True)
        rows.append(row)
    return rows


def main() -> None:
    parser = common.arguments(__doc__.splitlines()[0], "gpu")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--shape", nargs="+", default=list(LARGE), choices=list(SHAPES))
    parser.add_argument("--batch-size", type=int, default=16)
    options = parser.parse_args()
    on_card = options.device.startswith("cuda")
    if on_card and not torch.cuda.is_available():
        print("there is no GPU here: nothing was measured", file=sys.stderr)
        sys.exit(2)
    if options.promote and not (on_card and set(options.shape) <= set(LARGE)):
        parser.error("only a GPU's results with the large shapes can be promoted")
    torch.set_num_threads(options.threads)
    dtype = torch.bfloat16 if on_card else torch.float32
    peak = matrix_peak(options.device, dtype)
    result: dict[str, Any] = {
        "machine": common.machine(options.threads),
        "device": torch.cuda.get_device_name() if on_card else options.device,
        "dtype": str(dtype).removeprefix("torch."),
        "matrix_peak_tflops": round(peak / 1e12, 3),
        "shapes": {},
    }
    for shape in options.shape:
        found: list[Model] = []

        def make(shape: str = shape, found: list[Model] = found) -> None:
            found.append(shapes.random_model(SHAPES[shape](), options.device, dtype))
            finished(options.device)

        took = common.seconds(make)
        model = found.pop()
        weights = sum(p.numel() * p.element_size() for p in model.module.parameters())
        print(f"{shape}: made and checked in {took:.1f} s", flush=True)
        rows = [
            row
            for length in LENGTHS
            for row in measures(model, options.device, length, options, peak)
        ]
        result["shapes"][shape] = {
            "heads": len(model.heads),
            "load_seconds": round(took, 2),
            "weights_GiB": round(weights / 2**30, 3),
            "measures": rows,
        }
        del model
        gc.collect()  # its weights make room for the next ones
    common.finish(result, "gpu", options)


if __name__ == "__main__":
    main()
