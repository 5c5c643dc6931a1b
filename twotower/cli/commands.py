"""The command line. Each command imports the heavy libraries that it needs.

Exit codes: 0 success; 1 a finding does not hold, or an unexpected error; 2 unusable input,
environment or file; 130 interrupted; 141 the reader closed the pipe.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from cyclopts import App, CycloptsError, Parameter

from .. import __version__
from ..checks import whole
from ..errors import FindingError, InputError, TwoTowerError
from ..runs.configuration import Configuration, read_yaml
from ..runs.engine_settings import EngineSettings, HowRun
from ..runs.load_settings import How, LoadSettings, MaybeWhole, Whole
from .check import check
from .circuit import circuit
from .kinds import kinds
from .sizing import bench, console_of, plan
from .views import heads, report, show

app = App(
    name="twotower",
    help="Find, measure and explain the attention heads by which language models learn in context.",
    version=__version__,
    help_format="markdown",
)


@app.command
def demo(
    *,
    output: Path = Path("runs/demo.zarr"),
    task: str = "animals-cities",
    seed: Whole = 0,
    threads: MaybeWhole = None,
) -> None:
    """Find the in-context heads of a real model, and test them on other prompts.

    Fetches SmolLM2-135M-Instruct once (93 MB).

    Parameters
    ----------
    output
        Where to write the run; replaces an earlier run of the demo.
    task
        A task with two classes.
    seed
        Random seed for prompts and random heads.
    threads
        CPU threads; by default torch's choice.
    """
    import time

    from ..experiments.demo import (
        check_finding,
        check_places,
        print_finding,
        run_demo,
        save_finding,
    )
    from ..prompts import load_task

    console = console_of()
    check_places(output)
    whole("seed", seed)
    classes = load_task(task).classes  # reject a wrong name before the model is loaded
    if len(classes) != 2:
        raise InputError(f"the demo needs a task of two classes; {task!r} has {len(classes)}")
    start = time.perf_counter()
    model = Configuration(threads=threads).load_model()
    seconds = time.perf_counter() - start
    console.print(f"{model!r}, loaded and checked in {seconds:.1f} s", soft_wrap=True)
    finding = run_demo(model, task, seed)
    print_finding(finding, console)
    paths = save_finding(finding, output)
    saved = " and ".join(map(str, paths))
    console.print(f"Saved {saved}; open them with twotower.open.", soft_wrap=True)
    check_finding(finding)
    console.print(
        f"The finding holds: {len(finding.heads)} of {finding.run['scores']['qk_auc'].size} heads "
        "carry in-context learning here; those that write the answer look for the query's class "
        f"(QK) and copy its label (OV). {time.perf_counter() - start:.0f} s in all.",
        soft_wrap=True,
    )


@app.command
def analyze(*, config: Annotated[Configuration | None, Parameter(name="*")] = None) -> None:
    """Measure every head of a model on a task, and save the run.

    Settings can also come from a YAML file: twotower analyze --config run.yaml. The command
    line overrides the file.
    """
    from ..figures.texts import compared
    from ..measures.choose import in_context_heads
    from ..results import measured_prompts
    from ..runs.run import carry_out

    config = config or Configuration()
    console = console_of()
    finished = carry_out(
        config,
        log=lambda line: console.print(line, soft_wrap=True),
        progress=True,
    )
    for name in config.parts:
        run = finished.run.children[name] if name else finished.run
        if name:
            console.print(f"{name}:")
        if "predictions" in run.children:
            found = measured_prompts(run.children["predictions"])
            if found.sizes["prompt"]:
                by_prompt = found.attrs.get("answers") == "by prompt"
                between = compared(by_prompt, found.sizes["label"])
                console.print(
                    f"Accuracy {float(found['correct'].mean()):.2f} {between}, "
                    f"{float(found['top1_correct'].mean()):.2f} over the vocabulary"
                )
        if "effects" in run.children and not finished.driven.failed:
            effects = run["effects"]
            k = min(12, effects.sizes["layer"] * effects.sizes["head"])
            strongest = ", ".join(map(str, in_context_heads(run, k)))
            console.print(f"Strongest heads by effect: {strongest}", soft_wrap=True)
    if finished.driven.failed:
        raise FindingError(
            f"{len(finished.driven.failed)} units failed (twotower status {config.store} shows "
            "them); run the same command again to retry"
        )
    console.print(f"Saved {config.store}")


@app.command
def status(run: str, *, json: bool = False) -> None:
    """Show the progress of a run: units done, running, missing and failed, speed, time left.

    Parameters
    ----------
    run
        The store of `twotower analyze`: a path or a URL.
    json
        Print JSON.
    """
    from json import dumps

    from .status import show, status_of

    found = status_of(run)
    if json:
        print(dumps(found.as_json(), indent=1))
    else:
        show(found, console_of())


for command in (check, circuit, heads, kinds, show, report, plan, bench):
    app.command(command)


@app.command
def fetch() -> None:
    """Download the demo model, and print its path."""
    from ..models.fetch import fetch_demo_model

    console_of().print(str(fetch_demo_model()), soft_wrap=True)


@app.command
def tasks(name: str | None = None) -> None:
    """List the bundled tasks of classes and of pairs, or show some texts of one.

    Parameters
    ----------
    name
        A task to show.
    """
    from rich.table import Table

    from ..prompts import PairTask, bundled_pairs, bundled_tasks, load_pairs, load_task
    from ..prompts.read_task import read_task

    console = console_of()
    if name is not None:
        task = read_task(name)
        if isinstance(task, PairTask):
            console.print(f"{task.name}: {task.description} (pairs; {task.source})")
            shown = ", ".join(f"{given}: {output}" for given, output in task.pairs[:6])
            console.print(f"  ({len(task.pairs)}): {shown}, ...", soft_wrap=True)
            return
        console.print(f"{task.name}: {task.description} ({task.kind}; {task.source})")
        for cls, texts in task.texts.items():
            shown = ", ".join(texts[:6]) if task.kind == "words" else "; ".join(texts[:3])
            console.print(f"  {cls} ({len(texts)}): {shown}, ...", soft_wrap=True)
        return
    table = Table()
    for column in ("task", "kind", "classes", "texts a class", ""):
        table.add_column(column)
    for item in map(load_task, bundled_tasks()):
        least = min(map(len, item.texts.values()))
        hard = "hard for small models" if item.hard else ""
        table.add_row(item.name, item.kind, ", ".join(item.classes), str(least), hard)
    console.print(table)
    pairs = Table()
    for column in ("task of pairs", "pairs", "first pair"):
        pairs.add_column(column)
    for other in map(load_pairs, bundled_pairs()):
        pairs.add_row(other.name, str(len(other.pairs)), ": ".join(other.pairs[0]))
    console.print(pairs)


experiments = App(name="experiments", help="The paper's claims, one experiment each.")
app.command(experiments)


@experiments.command(name="list")
def list_experiments() -> None:
    """List the experiments and what they claim."""
    from rich.table import Table

    from ..experiments.suite import find_experiments

    table = Table()
    for column in ("", "experiment", "claim", "task"):
        table.add_column(column)
    for one in find_experiments().values():
        table.add_row(str(one.number), one.name, one.claim, one.task)
    console_of().print(table)


@experiments.command(name="run")
def run_experiments(
    *names: str,
    all: bool = False,
    quick: bool = False,
    model: str = "smollm2-135m",
    task: str | None = None,
    out: Path = Path("runs/experiments"),
    how: How = None,
    engine: HowRun = None,
    batch_size: Whole | None = None,
) -> None:
    """Run experiments: measure what is missing, judge, draw.

    Finished measurements with the same settings are reused. To resume an interrupted run,
    repeat the command.

    Parameters
    ----------
    names
        Names of experiments, or Python files that define one.
    all
        Run all of them.
    quick
        A short form with few prompts and one seed, without a verdict.
    model
        Hub id, folder, or smollm2-135m.
    task
        A task, as for `twotower analyze`; by default each experiment's own.
    out
        Where to write runs, figures and JSON files.
    batch_size
        Prompts per batch.
    """
    from ..experiments.suite import choose
    from ..experiments.suite_run import run_suite
    from ..experiments.units import Suite

    if batch_size is not None:
        whole("batch_size", batch_size, 1)
    chosen = choose(names, all)
    suite = Suite(
        names or tuple(one.name for one in chosen),
        model,
        how or LoadSettings(),
        task,
        out.expanduser(),
        quick,
        batch_size,
        show=True,
    )
    console = console_of()
    run_suite(
        suite, engine or EngineSettings(), log=lambda line: console.print(line, soft_wrap=True)
    )


@app.meta.default
def _launch(
    *tokens: Annotated[str, Parameter(show=False, allow_leading_hyphen=True)],
    config: Path | None = None,
    debug: bool = False,
) -> None:
    """Run a command.

    Parameters
    ----------
    config
        A YAML file of settings for `analyze`.
    debug
        Show the traceback of an error.
    """
    arguments = list(tokens)
    app.config = []
    if config is not None:
        if arguments[:1] != ["analyze"]:
            raise InputError("--config is only for `twotower analyze`")
        from cyclopts.config import Dict

        settings = {name.replace("_", "-"): value for name, value in read_yaml(config).items()}
        app.config = [Dict(settings, source=str(config), use_commands_as_keys=False)]
    app(arguments, exit_on_error=False, print_error=False)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; print errors as one line."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        app.meta(arguments, exit_on_error=False, print_error=False)
        sys.stdout.flush()
    except (TwoTowerError, CycloptsError) as error:
        if "--debug" in arguments:
            traceback.print_exc()
        text = " ".join(str(error).split())
        print(f"twotower: {text}", file=sys.stderr)
        sys.exit(1 if isinstance(error, FindingError) else 2)
    except KeyboardInterrupt:
        print("twotower: interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # for example `twotower heads RUN | head -3`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except Exception as error:
        if "--debug" in arguments:
            traceback.print_exc()
        text = " ".join(str(error).split())[:500]
        print(
            f"twotower: unexpected error ({type(error).__name__}: {text}); "
            "run again with --debug to see where",
            file=sys.stderr,
        )
        sys.exit(1)
