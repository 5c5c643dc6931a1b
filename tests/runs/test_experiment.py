"""Experiments: units by seed, going on where one stopped, verdicts, what is written."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import TWO, tiny

import twotower as tt
from twotower.experiments.experiment import (
    FULL,
    QUICK,
    Experiment,
    Judgement,
    Setting,
    check_task,
)
from twotower.experiments.run import run_experiment
from twotower.experiments.suite import find_experiments, load_experiment
from twotower.results import Variable
from twotower.statistics import Estimate, bootstrap_mean

SMALL = replace(FULL, n_fit=4, n_test=4, shots=1, k=2)


class Counted:
    """An experiment that counts its measurements, and can be made to stop at a seed."""

    def __init__(self, verdict: str = "supported", stop: int | None = None) -> None:
        self.measured: list[int] = []
        self.verdict, self.stop = verdict, stop

    def measure(self, setting: Setting) -> dict[str, Any]:
        if setting.seed == self.stop:
            raise KeyboardInterrupt
        self.measured.append(setting.seed)
        margin = tt.predict(setting.model, setting.test)["margin"].values
        about = Variable(("prompt",), "float", "margin", "as predicted")
        table = setting.table({"value": (about, margin)}, {"prompt": np.arange(len(margin))})
        return {"own": table}

    def judge(self, runs: list[Any]) -> Judgement:
        values = np.concatenate([run["own"]["value"].values for run in runs])
        return Judgement(self.verdict, "By the margins.", {"mean margin": bootstrap_mean(values)})

    def draw(self, runs: list[Any], judgement: Judgement) -> Any:
        from matplotlib import pyplot as plt

        figure, axes = plt.subplots()
        axes.plot(runs[0]["own"]["value"].values)
        return figure

    def run(self, out: Path, **settings: Any) -> dict[str, Any]:
        experiment = Experiment(
            99, "counted", "Counted", "A claim.", "A headline.", "A rule.",
            self.measure, self.judge, self.draw, version=settings.pop("version", 1),
        )  # fmt: skip
        settings = {"size": SMALL, "options": {"model": "tiny"}, **settings}
        said: list[str] = []
        found = run_experiment(
            experiment, lambda: tiny("llama"), TWO, out, log=said.append, **settings
        )
        self.said = said
        return found


def test_what_is_written(tmp_path: Path) -> None:
    one = Counted()
    found = one.run(tmp_path)
    assert one.measured == [0, 1, 2]
    assert {p.name for p in tmp_path.iterdir()} == {
        "counted", "counted.json", "counted.png", "counted.svg"
    }  # fmt: skip
    assert json.loads((tmp_path / "counted.json").read_text()) == found
    assert found["verdict"] == "supported"
    assert found["provenance"]["seeds"] == [0, 1, 2]
    assert len(set(found["provenance"]["prompts_hash"])) == 3
    assert found["provenance"]["versions"]["nnsight"]
    assert found["size"]["n_test"] == 4
    assert found["rule"] == "A rule."
    # Numbers are those of the stored runs, of all seeds, each with its n.
    stores = sorted((tmp_path / "counted").iterdir())
    assert len(stores) == 3
    values = np.concatenate([tt.open(p)["own"]["value"].values for p in stores])
    number = found["numbers"]["mean margin"]
    assert number["n"] == 12
    assert number["value"] == pytest.approx(values.mean())
    assert number["low"] < number["value"] < number["high"]
    assert (tmp_path / "counted.png").read_bytes()[:4] == b"\x89PNG"


def test_nothing_is_measured_twice(tmp_path: Path) -> None:
    Counted().run(tmp_path)
    again = Counted()
    again.run(tmp_path)
    assert again.measured == []
    assert sum("measured before" in line for line in again.said) == 3
    for settings in (
        {"options": {"model": "other"}},
        {"options": {"model": "tiny", "dtype": "bfloat16"}},
        {"version": 2},
        {"size": replace(SMALL, n_test=5)},
    ):
        other = Counted()
        other.run(tmp_path, **settings)
        assert other.measured == [0, 1, 2], settings


def test_goes_on_where_it_stopped(tmp_path: Path) -> None:
    first = Counted(stop=1)
    with pytest.raises(KeyboardInterrupt):
        first.run(tmp_path)
    assert first.measured == [0]
    assert not (tmp_path / "counted.json").exists()
    second = Counted()
    found = second.run(tmp_path)
    assert second.measured == [1, 2]
    whole = Counted().run(tmp_path / "elsewhere")
    assert found["numbers"] == whole["numbers"]


def test_no_verdict_from_fewer_than_three_seeds(tmp_path: Path) -> None:
    found = Counted().run(tmp_path, size=replace(SMALL, seeds=(0, 1)))
    assert found["verdict"] == "undecided"
    assert "needs three" in found["reason"]


def test_an_unknown_verdict_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="gives the verdict 'proved'"):
        Counted(verdict="proved").run(tmp_path)


def test_halves_share_no_text_and_seeds_differ() -> None:
    first = Setting(tiny("llama"), TWO, 0, SMALL, Path("unused"))
    second = Setting(tiny("llama"), TWO, 1, SMALL, Path("unused"))
    assert not first.fit.texts & first.test.texts
    assert len(first.fit) == len(first.test) == 4
    assert first.test.hash != second.test.hash
    fit, test = first.build(shots={"foo": 2, "bar": 1}, order="blocked")
    assert (fit.label_text[0][fit.role[0] == "label"] == "foo").sum() == 2
    assert len(test) == 4


def test_selections_are_kept_and_shared(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("twotower.experiments.experiment.check_task", lambda run, name: None)
    setting = Setting(tiny("llama"), TWO, 0, SMALL, tmp_path)
    heads = setting.heads
    assert len(list(tmp_path.iterdir())) == 1
    effects = tt.head_effects(tiny("llama"), setting.fit)
    assert heads == tt.in_context_heads(effects, 2)
    monkeypatch.setattr("twotower.measures.analyze", lambda *a, **k: pytest.fail("measured again"))
    again = Setting(tiny("llama"), TWO, 0, SMALL, tmp_path)
    assert again.heads == heads
    assert len(again.writers) == 2


def test_random_heads(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("twotower.experiments.experiment.check_task", lambda run, name: None)
    setting = Setting(tiny("llama"), TWO, 0, SMALL, tmp_path)
    draws = setting.random_heads(k=5)
    assert [len(draw) for draw in draws] == [5] * SMALL.n_random
    assert all(not set(draw) & set(setting.heads) for draw in draws)
    assert draws == setting.random_heads(k=5)
    like = [tt.Head(0, 1), tt.Head(0, 2), tt.Head(2, 3)]
    for draw in setting.random_heads(like=like):
        assert not set(draw) & set(like)
        for layer in (0, 2):
            left = 4 - sum(h.layer == layer for h in {*like, *setting.heads})
            wanted = min(left, sum(h.layer == layer for h in like))
            assert sum(h.layer == layer for h in draw) == wanted


def test_a_model_that_cannot_do_the_task_is_told(tmp_path: Path) -> None:
    setting = Setting(tiny("llama"), TWO, 0, replace(SMALL, n_fit=12), tmp_path)
    with pytest.raises(tt.errors.FindingError, match=r"cannot do animals-cities-tiny: \d+ of 12"):
        _ = setting.heads


def test_exact_binomial(llama: tt.Model) -> None:
    """9 of 10 right between two labels has p = 11/1024; 8 of 10 has 56/1024, not enough."""
    run = tt.analyze(
        llama, tt.build_prompts(llama, TWO, shots=1, n=10), measures=("predictions", "effects")
    )
    for right, fails in ((9, False), (8, True)):
        changed = run.copy()
        correct = run["predictions"]["correct"].copy(data=np.arange(10) < right)
        changed["predictions"] = run["predictions"].to_dataset().assign(correct=correct)
        if fails:
            with pytest.raises(tt.errors.FindingError, match=r"8 of 10 .* p = 0\.05"):
                check_task(changed, "m")
        else:
            check_task(changed, "m")


def test_intervals() -> None:
    assert Estimate(0.5, 0.1, 0.9, 10).positive
    assert not Estimate(0.5, -0.1, 0.9, 10).positive
    assert Estimate(-0.5, -0.9, -0.1, 10).negative
    values = np.random.default_rng(0).normal(2.0, 1.0, 400)
    found = bootstrap_mean(values)
    # The normal approximation: mean and 1.96 standard errors.
    spread = 1.96 * values.std(ddof=1) / 20
    assert found.value == pytest.approx(values.mean())
    assert found.low == pytest.approx(values.mean() - spread, abs=0.02)
    assert found.high == pytest.approx(values.mean() + spread, abs=0.02)


# ---- the suite -----------------------------------------------------------------------------


def test_the_suite_is_in_order() -> None:
    found = find_experiments()
    numbers = [one.number for one in found.values()]
    assert numbers == sorted(set(numbers))
    for one in found.values():
        assert one.claim.endswith(".")
        for verdict in ("upported", "ot supported", "ndecided"):
            assert verdict in " ".join(one.rule.split()), (
                f"{one.name}'s rule does not say when it is {verdict}"
            )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("EXPERIMENT = 3", "defines no EXPERIMENT"),
        ("EXPERIMENT = 1 / 0", "cannot be run: ZeroDivisionError"),
    ],
)
def test_files_that_make_no_experiment(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "mine.py"
    path.write_text(text)
    with pytest.raises(tt.errors.InputError, match=message):
        load_experiment(path)
    with pytest.raises(tt.errors.InputError, match="is not a Python file"):
        load_experiment(tmp_path / "absent.py")


def test_quick_is_small() -> None:
    assert len(FULL.seeds) >= 3
    assert QUICK.n_test < FULL.n_test
