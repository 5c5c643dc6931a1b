"""What experiments compute of a prompt is NaN where the prompt is not finite, and else the same."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import not_finite as given
import numpy as np
import pytest
import xarray as xr

import twotower as tt
from twotower.experiments import parts
from twotower.experiments.experiment import check_task

majority, ov, qk, recency = (
    importlib.import_module(f"experiments.{name}")
    for name in ("majority_bias", "ov_labels", "qk_similarity", "recency_bias")
)

HEADS = [[(0, 1), (1, 2)], [(2, 3)]]
OF_PROMPTS: dict[str, Callable[[xr.DataTree], Any]] = {
    "summed attention": lambda run: majority.summed_attention(run["qk"], "foo", HEADS),
    "attention to the right label": lambda run: qk._attention_margin(
        run["qk"], run["qk"]["gold"].values
    ),
    "own label": lambda run: qk._own_label(run["ov"]),
    "by role": lambda run: ov.over_role(ov.own_label_logit(run["ov"]), ov.roles_of(run["ov"]))[
        :, ov.ROLES.index("label")
    ],
    "by distance": lambda run: recency.by_distance(run["qk"].to_dataset())["near_attention"],
}


@pytest.fixture(scope="module")
def runs() -> tuple[xr.DataTree, xr.DataTree, np.ndarray]:
    prompts = given.prompts()
    bad = given.holds(prompts)
    with given.unwarned():
        run = tt.analyze(given.model(), prompts, keep="labels")
    return run, tt.analyze(given.model(), prompts[np.flatnonzero(~bad)], keep="labels"), bad


@pytest.mark.parametrize("name", OF_PROMPTS)
def test_of_prompts(name: str, runs: Any) -> None:
    run, alone, bad = runs
    found, expected = OF_PROMPTS[name](run), OF_PROMPTS[name](alone)
    assert np.isnan(found[bad]).all()
    np.testing.assert_allclose(found[~bad], expected, rtol=0.02, atol=0.02)


def test_a_task_is_judged_by_finite_prompts(runs: Any) -> None:
    run, alone, bad = runs
    words = []
    for one in (run, alone):
        wrong = one.copy()
        answers = one["predictions"].to_dataset(inherit=False)
        wrong["predictions"] = answers.assign(correct=answers["correct"] * 0.0)
        with pytest.raises(tt.errors.FindingError) as caught:
            check_task(wrong, "it")
        words.append(str(caught.value))
    assert words[0] == words[1]
    assert f"0 of {(~bad).sum()} prompts" in words[0]


def test_margins_without_a_number() -> None:
    found = parts.right(np.array([1.0, -1, np.nan]))
    np.testing.assert_array_equal(found, [1, 0, np.nan])
