"""A plan as a table in the terminal."""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING

from ..walk.memory import readable
from .plan import Part, Plan

if TYPE_CHECKING:
    from rich.console import Console

COLUMNS = ("libraries", "weights", "activations", "rows", "results")


def print_plan(plan: Plan, console: Console) -> None:
    """Print memory by device, whether it fits, and the largest batch."""
    from rich.table import Table

    quantized = f", {plan.quantization}" if plan.quantization else ""
    console.print(
        f"{plan.model}, {plan.dtype}{quantized}: analyze() on {plan.prompts} prompts of "
        f"{plan.prompt_tokens} tokens, {plan.batch} per batch; GiB",
        soft_wrap=True,
    )
    table = Table()
    for name in ("", *(part.device for part in plan.parts)):
        table.add_column(name, justify="right" if name else "left")
    table.add_row("layers", *(ranges(part.layers) for part in plan.parts))
    for name in COLUMNS:
        table.add_row(name, *(_gib(getattr(part, name)) for part in plan.parts))
    table.add_section()
    table.add_row("total", *(_gib(part.total) for part in plan.parts))
    table.add_row("available", *(_gib(part.limit) for part in plan.parts))
    table.add_row("", *(_verdict(part) for part in plan.parts))
    console.print(table)
    if not plan.fits:
        console.print("It does not fit.")
        return
    more = "4,096 or more" if plan.largest_batch >= 4096 else f"{plan.largest_batch:,}"
    console.print(f"It fits. Largest batch: {more} prompts.")
    if 0 < plan.largest_batch_on_gpus < plan.largest_batch:
        console.print(
            f"Up to {plan.largest_batch_on_gpus:,} prompts, no weights are moved off the GPUs.",
        )
    if len(plan.max_memory) > 1:
        given = {name: readable(size) for name, size in plan.max_memory.items()}
        console.print(f'Load it with device_map="auto", max_memory={given}', soft_wrap=True)


def _gib(size: int | None) -> str:
    return "" if not size else f"{size / 2**30:.2f}"


def _verdict(part: Part) -> str:
    return "" if part.limit is None else "fits" if part.fits else "too much"


def ranges(numbers: list[int]) -> str:
    """Format whole numbers as "0-3, 7"."""
    found = []
    for _, group in groupby(enumerate(sorted(numbers)), lambda pair: pair[1] - pair[0]):
        run = [number for _, number in group]
        found.append(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}")
    return ", ".join(found)
