"""The demo: find the in-context heads of a model, and show what they do.

Heads are chosen on one half of the prompts and tested on the other half, which shares no text
with it. The result is printed, saved, and judged by fixed rules.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..edits.edits import KnockOut
from ..errors import FindingError, StoreError
from ..progress import stage as show_stage
from ..results import GROUPS, measured_prompts
from ..results.forms import describe
from ..statistics import Estimate, bootstrap_mean, random_bound
from .random_heads import random_heads

if TYPE_CHECKING:
    import xarray as xr

    from ..head import Head
    from ..models import Model

N_PROMPTS = 120
N_HEADS = 12
N_RANDOM = 5
N_TOP = 2
"""Heads of each kind for which the most likely token at every position is stored."""


@dataclass
class Finding:
    """Result of the demo.

    Attributes
    ----------
    heads
        The in-context heads, strongest first: knocking them out lowers the margin most on
        the selection prompts.
    writers
        The heads that write the answer: their own output raises the right label most on the
        selection prompts.
    accuracy
        By condition ("before", "after", "writers", "random heads") and measure ("correct"
        between the labels, "top1_correct" over the vocabulary), on the test prompts.
    drop
        Accuracy lost by knocking out the in-context heads, minus that lost with random heads,
        by measure; paired by prompt.
    run
        The run on the test prompts.
    selection
        The run on the selection prompts, with the effects used for the choice.
    seconds
        Wall time of each stage.
    """

    heads: list[Head]
    writers: list[Head]
    accuracy: dict[str, dict[str, Estimate]]
    drop: dict[str, Estimate]
    run: xr.DataTree
    selection: xr.DataTree
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def chance(self) -> float:
        """Accuracy of guessing between the labels."""
        return 1 / len(json.loads(self.run.attrs["labels"]))

    def failures(self) -> list[str]:
        """Return the claims that do not hold.

        1. With all heads the model beats chance between the labels (interval).
        2. Knocking out the in-context heads costs more accuracy than knocking out equally
           many random heads, by both measures (interval of the paired difference).
        3. The mean QK AUC and the mean OV AUC of the heads that write the answer exceed those
           of 95% of random sets of equally many heads.
        """
        failed = []
        if not self.accuracy["before"]["correct"].low > self.chance:
            failed.append(f"accuracy {self.accuracy['before']['correct']} is not above chance")
        for measure, drop in self.drop.items():
            if not drop.low > 0:
                failed.append(f"the heads' knock-out costs no more {measure} than random: {drop}")
        for name in ("qk_auc", "ov_auc"):
            mean, bound = self.compare(name)
            if not mean > bound:
                failed.append(f"mean {name} {mean:.2f} does not exceed random sets ({bound:.2f})")
        return failed

    def compare(self, score: str, seed: int = 0) -> tuple[float, float]:
        """Return a score's mean over the writers, and its 95th percentile over random sets."""
        values = self.run.children["scores"].dataset[score].values
        bound = random_bound(values, len(self.writers), seed)
        return float(np.mean([values[head] for head in self.writers])), bound


def run_demo(
    model: Model,
    task: str = "animals-cities",
    seed: int = 0,
    progress: bool = True,
) -> Finding:
    """Find the in-context heads of a model and test them on other prompts.

    Parameters
    ----------
    model
        A loaded model.
    task
        Name of a task with two classes.
    seed
        Random seed for prompts and random heads.
    progress
        Whether to show a progress bar for each stage.

    Returns
    -------
    Finding
    """
    from ..measures.analyze import analyze
    from ..measures.choose import in_context_heads
    from ..measures.ov import ov_labels
    from ..measures.predict import predict
    from ..measures.scores import two_tower_scores
    from ..prompts import build_prompts, load_task

    seconds: dict[str, float] = {}

    @contextmanager
    def stage(name: str) -> Iterator[None]:
        start = time.perf_counter()
        with show_stage(name, progress):
            yield
        seconds[name] = time.perf_counter() - start

    with stage("building prompts"):
        prompts = build_prompts(model, load_task(task), ("foo", "bar"), n=N_PROMPTS, seed=seed)
        fit, test = prompts.split(0.5, seed=seed)
    with stage("sweeping every head"):
        measures = ("predictions", "effects", "attribution")
        selection = analyze(model, fit, measures=measures, logprobs=False)
        heads = in_context_heads(selection, N_HEADS)
        writers = in_context_heads(selection, N_HEADS, by="label_logit")
    with stage("measuring QK and OV"):
        run = analyze(model, test, measures=("predictions", "qk"))
        top = list(dict.fromkeys(heads[:N_TOP] + writers[:N_TOP]))
        run["ov"] = ov_labels(model, test, top_tokens=top)
        # The effects used to choose heads are stored beside the scores of the test prompts.
        known = GROUPS["scores"]["margin_drop"]
        swept = measured_prompts(selection.children["effects"])
        effect = swept["margin_drop"].mean("prompt").values
        about = {
            **describe(known),
            "long_name": "mean drop of the margin, on the prompts that heads were chosen on",
            "reference": "mean over the selecting prompts of their effects.margin_drop",
        }
        described = (known.dims, effect, about)
        run["scores"] = two_tower_scores(run).assign(margin_drop=described)
    with stage("knocking out in-context heads"):
        after = predict(model, test, [KnockOut(heads, "all")])
        silent = predict(model, test, [KnockOut(writers, "all")])
    draws = random_heads(model.heads, len(heads), N_RANDOM, [seed, 17], without=heads)
    with stage(f"knocking out random heads, {N_RANDOM} draws"):
        random = [predict(model, test, [KnockOut(draw, "all")]) for draw in draws]
    conditions = ("before", "after", "writers", "random heads")
    accuracy: dict[str, dict[str, Estimate]] = {name: {} for name in conditions}
    drop: dict[str, Estimate] = {}
    predictions = run.children["predictions"].dataset
    for name in ("correct", "top1_correct"):
        # NaN where a prompt is not finite; bootstrap_mean ignores it.
        mean_random = np.mean([r[name].values for r in random], axis=0)
        accuracy["before"][name] = bootstrap_mean(predictions[name].values)
        accuracy["after"][name] = bootstrap_mean(after[name].values)
        accuracy["writers"][name] = bootstrap_mean(silent[name].values)
        accuracy["random heads"][name] = bootstrap_mean(mean_random)
        drop[name] = bootstrap_mean(mean_random - after[name].values)
    run.attrs["in_context_heads"] = json.dumps(heads)
    run.attrs["writing_heads"] = json.dumps(writers)
    run.attrs["random_heads"] = json.dumps(draws)
    run.attrs["accuracy"] = json.dumps(accuracy)
    return Finding(heads, writers, accuracy, drop, run, selection, seconds)


def _selection(path: Path) -> Path:
    """Return the path for the selection prompts' run, beside the test prompts' run."""
    return path.with_name(f"{path.stem}-selection{path.suffix}")


def check_places(path: Path) -> None:
    """Check that the runs can be saved at a path, before anything is measured."""
    from ..results.store import check_place

    if not path.name:
        raise StoreError(f"{str(path)!r} is not a path for a run; use a folder such as demo.zarr")
    for place in (path, _selection(path)):
        check_place(place, overwrite=True)


def save_finding(finding: Finding, path: Path, overwrite: bool = True) -> list[Path | str]:
    """Write the test prompts' run to `path`, and the selection prompts' run beside it."""
    from ..results import save

    selection = _selection(path)
    return [
        save(finding.run, path, overwrite=overwrite),
        save(finding.selection, selection, overwrite=overwrite),
    ]


def check_finding(finding: Finding) -> None:
    """Raise `FindingError` if a claim does not hold."""
    failed = finding.failures()
    if failed:
        raise FindingError("the finding does not hold here: " + "; ".join(failed))


def print_finding(finding: Finding, console: Any) -> None:
    """Print the finding as tables."""
    from rich.table import Table

    accuracy, scores = finding.accuracy, finding.run.children["scores"].dataset
    swept = measured_prompts(finding.selection.children["effects"])
    effects = swept["margin_drop"].mean("prompt")
    n, k = accuracy["before"]["correct"].n, len(finding.heads)
    table = Table(title=f"Accuracy on {n} held-out prompts (95% bootstrap interval)")
    table.add_column("knocked out, at all positions")
    table.add_column("between the labels", justify="right")
    table.add_column("top-1 of the vocabulary", justify="right")
    for name, words in (
        ("before", "nothing"),
        ("after", f"the {k} in-context heads"),
        ("writers", f"the {k} heads that write the answer"),
        ("random heads", f"{k} random heads (mean of {N_RANDOM} draws)"),
    ):
        row = accuracy[name]
        table.add_row(words, str(row["correct"]), str(row["top1_correct"]))
    console.print(table)
    columns = {
        "effect on margin": effects,
        "QK AUC": scores["qk_auc"],
        "QK AUC, content": scores["qk_auc_content"],
        "OV AUC": scores["ov_auc"],
    }
    for title, heads in (
        (f"In-context heads: largest effect of {effects.size}", finding.heads),
        ("Heads that write the answer: largest label logit", finding.writers),
    ):
        table = Table(title=title)
        table.add_column("head", justify="right")
        for name in columns:
            table.add_column(name, justify="right")
        rows = [[x.values[head] for x in columns.values()] for head in heads]
        for head, numbers in zip(heads, rows, strict=True):
            table.add_row(str(head), *_numbers(numbers))
        table.add_section()
        table.add_row("their mean", *_numbers(np.mean(rows, axis=0)))
        table.add_row("mean of all", *_numbers([float(x.mean()) for x in columns.values()]))
        console.print(table)
    times = ", ".join(f"{name} {value:.0f} s" for name, value in finding.seconds.items())
    console.print(f"Times: {times}.", soft_wrap=True)


def _numbers(row: Any) -> list[str]:
    """Format an effect with its sign, and scores."""
    return [f"{row[0]:+.2f}", *(f"{x:.2f}" for x in row[1:])]
