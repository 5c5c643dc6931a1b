"""Commands for a model's memory and time: `twotower plan` and `twotower bench`."""

from __future__ import annotations

from typing import Annotated, Any

from ..errors import FindingError, InputError
from ..runs.configuration import Words
from ..runs.load_settings import How, LoadSettings, Whole

PIPED_WIDTH = 160


def console_of() -> Any:
    """Return the console that commands print to: plain text, without markup."""
    from rich.console import Console

    class Piped(Console):
        """Console that raises when the reader closes the pipe."""

        def on_broken_pipe(self) -> None:
            raise BrokenPipeError

    console = Piped(highlight=False, markup=False)
    if not console.is_terminal:
        console.width = max(console.width, PIPED_WIDTH)  # do not truncate lines in files
    return console


def plan(
    model: str,
    *,
    gpu: Annotated[list[str] | None, Words] = None,
    cpu: str | None = None,
    dtype: str | None = None,
    quantization: str | None = None,
    device_map: str = "auto",
    prompt_tokens: Whole = 500,
    batch: Whole = 8,
    prompts: Whole = 100,
    keep: str = "all",
    revision: str | None = None,
    json: bool = False,
) -> None:
    """Estimate a model's memory on given devices, and whether it fits; read no weights.

    Exit code 1 if it does not fit.

    Parameters
    ----------
    model
        Hub id, folder, or llama-7b, gpt-j-6b or gpt2-large.
    gpu
        Memory of each GPU, such as 24GiB.
    cpu
        Memory of the machine; by default this machine's.
    dtype
        float32, bfloat16 or float16; by default the checkpoint's.
    quantization
        int8 or nf4.
    device_map
        auto, balanced, balanced_low_0 or sequential.
    prompt_tokens
        Tokens per prompt.
    batch
        Prompts per batch.
    prompts
        Total number of prompts.
    keep
        Stored positions of QK and OV: all or labels.
    revision
        Branch, tag or commit on the hub.
    json
        Print JSON.
    """
    from json import dumps

    from ..sizing.plan import make_plan
    from ..sizing.table import print_plan

    if gpu is not None and not gpu:
        raise InputError("--gpu needs the memory of each GPU, such as --gpu 80GiB 80GiB")
    found = make_plan(
        model,
        gpus=gpu or (),
        cpu=cpu,
        dtype=dtype,
        quantization=quantization,
        device_map=device_map,
        prompt_tokens=prompt_tokens,
        batch=batch,
        prompts=prompts,
        keep=keep,
        revision=revision,
    )
    if json:
        print(dumps(found.describe(), indent=1))
    else:
        print_plan(found, console_of())
    if not found.fits:
        raise FindingError(f"{model} does not fit: {'; '.join(found.advice)}")


def bench(
    model: str = "smollm2-135m",
    *,
    weights: str | None = None,
    how: How = None,
    prompt_tokens: Whole = 100,
    batch: Whole = 8,
    rounds: Whole = 3,
    measures: Annotated[list[str] | None, Words] = None,
    json: bool = False,
) -> None:
    """Time a model on this machine: loading, a plain forward, sweeps, all measures.

    Parameters
    ----------
    model
        Hub id, folder, smollm2-135m, or a shape: llama-7b, gpt-j-6b, gpt2-large.
    weights
        "random" for random weights.
    prompt_tokens
        Approximate number of tokens per prompt.
    batch
        Prompts per batch.
    rounds
        Number of timed rounds; the median is reported.
    measures
        effects, effects-logprobs, effects-labels, effects-all, qk-ov, attribution, analyze,
        analyze-save-open; by default effects and analyze.
    json
        Print JSON.
    """
    from json import dumps

    from ..sizing.bench import DEFAULT, prompts_near
    from ..sizing.bench import bench as measure

    settings = how or LoadSettings()
    console = console_of()
    found = measure(
        lambda: settings.load(model, weights=weights),
        prompts_near,
        prompt_tokens,
        batch,
        rounds,
        measures or DEFAULT,
        log=lambda line: None if json else console.print(line, soft_wrap=True),
    )
    if json:
        print(dumps(found, indent=1))
        return
    for name, one in found["measures"].items():
        console.print(
            f"{name}: {one['seconds_per_prompt']:.3f} s a prompt, {one['forwards']:.2f} plain "
            f"forwards, {one['tokens_per_second']:.0f} tokens/s",
            soft_wrap=True,
        )
