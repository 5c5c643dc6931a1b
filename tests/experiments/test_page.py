"""The page of the experiments is that of the committed results."""

from __future__ import annotations

import importlib

import pytest

from twotower.experiments.suite import experiments_folder, find_experiments

FOLDER = experiments_folder()


@pytest.fixture(scope="module")
def page():
    return importlib.import_module("experiments.page")


def test_up_to_date(page) -> None:
    assert (FOLDER / "README.md").read_text() == page.page(page.results())


def test_results_are_of_experiments_that_are_there(page) -> None:
    known = find_experiments()
    for result in page.results():
        experiment = known[result["name"]]
        assert result["size"]["name"] == "full"
        # A rule that was changed after the numbers were seen would show here.
        assert result["rule"] == " ".join(experiment.rule.split())
        assert result["claim"] == experiment.claim
        for kind in ("png", "svg"):
            assert (FOLDER / "figures" / f"{result['name']}.{kind}").is_file()


def test_numbers(page) -> None:
    assert page.number({"value": 0.5, "low": 0.25, "high": 0.75, "n": 8}) == (
        "0.50 [0.25, 0.75] (n = 8)"
    )
    assert page.number({"value": 1.0, "low": None, "high": None, "n": 1}) == "1.00 (n = 1)"
    assert page.number(0.0123) == "0.012"
    assert page.number(7) == "7"
    share = {"value": 0.5, "low": None, "high": None, "n": 1}
    assert page.table("Tasks", {"columns": ["task", "share"], "rows": [["one", share]]}) == [
        "**Tasks**",
        "",
        "| task | share |",
        "|---|---|",
        "| one | 0.50 (n = 1) |",
        "",
    ]
    assert page.anchor("Two towers, as metric learning") == "two-towers-as-metric-learning"
