"""More than two classes: each verdict, tasks left out, and heads that labels share."""

from __future__ import annotations

import importlib

import numpy as np
import pytest
import xarray as xr


@pytest.fixture(scope="module")
def module():
    return importlib.import_module("experiments.more_classes")


def run(module, task: str, left: float, random: float, auc: float, n: int = 60) -> dict:
    """Groups of a task: top-1 accuracy left by in-context and by random heads; writers' AUCs."""
    rng = np.random.default_rng(1)
    right = np.ones((n, 4, 2))
    right[:, 1, 1] = rng.random(n) < left
    right[:, 3, 1] = rng.random(n) < random
    scores = np.full((10, 10), 0.5)
    numbers = np.full((5, 12, 2), -1)
    numbers[:2, :12] = [(layer, 0) for layer in range(6)] + [(layer, 1) for layer in range(6)]
    scores[:6, :2] = auc
    numbers[2, :2], numbers[3, :2], numbers[4, :2] = (
        [(0, 0), (1, 1)],
        [(1, 1), (2, 2)],
        [(1, 1), (3, 3)],
    )
    kinds = ["writers", "in_context", "foo", "bar", "map"]
    dims = ("layer", "head")
    return {
        f"{task}-accuracy": xr.Dataset({"right": (("prompt", "condition", "measure"), right)}),
        f"{task}-scores": xr.Dataset({"qk_auc": (dims, scores), "ov_auc": (dims, scores)}),
        f"{task}-heads": xr.Dataset(
            {"number": (("kind", "rank", "part"), numbers)}, {"kind": kinds}
        ),
    }


def tree(*parts: dict) -> xr.DataTree:
    return xr.DataTree.from_dict({name: x for part in parts for name, x in part.items()})


@pytest.mark.parametrize(
    ("cases", "verdict"),
    [
        ([(0.1, 0.9, 0.9)], "supported"),
        ([(0.1, 0.9, 0.9), (0.2, 0.8, 0.8)], "supported"),
        ([(0.1, 0.9, 0.9), (0.9, 0.2, 0.8)], "not supported"),
        ([(0.5, 0.5, 0.9)], "undecided"),
        ([(0.1, 0.9, 0.5)], "undecided"),
    ],
)
def test_verdicts(module, cases, verdict: str) -> None:
    parts = [run(module, task, *case) for task, case in zip(module.TASKS, cases, strict=False)]
    found = module.judge([tree(*parts)] * 3)
    assert found.verdict == verdict


def test_a_task_must_be_done_in_every_seed(module) -> None:
    both = [run(module, task, 0.1, 0.9, 0.9) for task in module.TASKS[:2]]
    runs = [tree(*both), tree(*both), tree(both[0])]
    assert module.tasks_of(runs) == [module.TASKS[0]]
    found = module.judge(runs)
    assert not any(words.startswith(module.TASKS[1]) for words in found.numbers)
    assert module.judge([tree({"x": xr.Dataset()})] * 3).verdict == "undecided"


def test_shared_heads_by_hand(module) -> None:
    task = module.TASKS[0]
    numbers = module.judge([tree(run(module, task, 0.1, 0.9, 0.9))] * 3).numbers
    assert numbers[f"{task}: heads that two labels share, of 6"] == 1.0  # head 1.1 alone
    assert numbers[f"{task}: the same by chance"] == pytest.approx(36 / 100)
    assert numbers[f"{task}: chance between the labels"] == pytest.approx(1 / 3)


def test_prompts_in_whole_blocks(module) -> None:
    assert module.prompts_of(3, 60) == 54
    assert module.prompts_of(4, 60) == 48
    assert module.prompts_of(6, 60) == 36
    assert module.prompts_of(6, 12) == 12
