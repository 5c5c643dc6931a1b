"""Questions of the experiments: sets without common texts, completions, and their effects."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import twotower as tt
from twotower.experiments import questions
from twotower.experiments.experiment import FULL, QUICK, Setting

pytestmark = pytest.mark.demo_model


@pytest.fixture
def setting(random_model: tt.Model, tmp_path: Path) -> Setting:
    return Setting(random_model, tt.load_task("animals-cities"), 1, FULL, tmp_path)


def test_questions(setting: Setting) -> None:
    forms = questions.questions(setting)
    assert forms["animals-cities"] == "classification"
    assert list(forms.values()).count("pairs") == 6
    few = questions.questions(replace(setting, size=QUICK))
    assert set(few.values()) == set(forms.values())
    assert len(few) < len(forms)


def test_halves(setting: Setting) -> None:
    """Sets share no text, and are the beginning of larger ones."""
    for name, form in questions.questions(setting).items():
        first, second = questions.halves(setting, name, 4)
        assert len(first) == len(second) == 4
        assert not first.texts & second.texts, name
        more = questions.halves(setting, name, 6)
        assert [x.strings[:4] for x in more] == [first.strings, second.strings], name
        if form in ("pairs", "completions") or name == "agreement":
            assert first.answers.token_id.shape[2] == 1, name


def test_completions(setting: Setting) -> None:
    for name in questions.CHAINS:
        prompts, _ = questions.halves(setting, name, 4)
        for text, (right, *wrong) in zip(prompts.strings, prompts.answers.text, strict=True):
            *shown, asked = text.split("\n")
            assert len(shown) == questions.SHOTS
            given, middle = asked.removesuffix(",").split(": ")
            assert right not in wrong
            known = dict(line.split(": ")[1].split(", ") for line in shown)
            if name == questions.CLASS_CHAIN:
                assert f" {known[middle]}" == right
                assert given in setting.task.texts[middle]
            elif name == questions.LETTER_CHAIN:
                assert right == f" {middle[0]}"
    gold = questions.halves(setting, questions.CLASS_CHAIN, 8)[0].answers.text[:, 0]
    assert sorted(gold) == [" bar"] * 4 + [" foo"] * 4


def test_effects_of_completions(setting: Setting) -> None:
    """They equal the difference of two traces of whole completions."""
    prompts, _ = questions.halves(setting, questions.CLASS_CHAIN, 2)
    found = questions.sweep(setting, questions.CLASS_CHAIN, prompts)["effects"]["margin_drop"]
    ends = [text.rindex(":") + 1 for text in prompts.strings]
    starts = [text[:end] for text, end in zip(prompts.strings, ends, strict=True)]
    chains = [text[end:] for text, end in zip(prompts.strings, ends, strict=True)]
    asked = tt.contrast(setting.model, starts, right=chains)
    traced = []
    for answers in prompts.answers.text.T:
        spans = [
            {"answer": (len(chain), len(chain + answer))}
            for chain, answer in zip(chains, answers, strict=True)
        ]
        completions = [chain + answer for chain, answer in zip(chains, answers, strict=True)]
        result = tt.trace_effects(setting.model, asked, completions, spans=spans, keep="answer")
        traced.append(result["answer_drop"].values)
    np.testing.assert_allclose(found.values, traced[0] - traced[1], atol=2e-5)


def test_measured_once(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = questions.halves(setting, "opposites", 2)[0]
    first = questions.sweep(setting, "opposites", prompts)
    monkeypatch.setattr(questions, "analyze", None)
    again = questions.sweep(setting, "opposites", prompts)
    assert first["effects"]["margin_drop"].equals(again["effects"]["margin_drop"])
