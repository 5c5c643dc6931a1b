"""An experiment of the suite in its short form, and what it must leave."""

from __future__ import annotations

import json
from pathlib import Path

import twotower as tt
from twotower.experiments.experiment import QUICK, Size
from twotower.experiments.run import run_experiment
from twotower.experiments.suite import find_experiments
from twotower.prompts import load_task

SUITE = find_experiments()


def quick_form(model: tt.Model, out: Path, name: str, size: Size = QUICK) -> None:
    experiment = SUITE[name]
    task = load_task(experiment.task)
    found = run_experiment(experiment, lambda: model, task, out, size=size)
    assert found["verdict"] == "undecided"  # one seed
    assert found["numbers"]
    for words, number in found["numbers"].items():
        if isinstance(number, dict):
            assert number["n"] > 0, words
            if number["low"] is not None:
                assert number["low"] <= number["high"], words
                # On a model that cannot do the task, a share of nothing may lie anywhere.
                if size is QUICK:
                    assert number["low"] <= number["value"] <= number["high"], words
    for kind in ("json", "png", "svg"):
        assert (out / f"{name}.{kind}").stat().st_size > 500
    assert json.loads((out / f"{name}.json").read_text())["model"] == model.name
    (store,) = (out / name).glob("*.zarr")
    run = tt.open(store)
    assert run.attrs["prompts_hash"]
