"""Small models of other architectures: what they are trained on, and each verdict."""

from __future__ import annotations

import importlib
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr

import twotower as tt


@pytest.fixture(scope="module")
def module():
    return importlib.import_module("experiments.other_architectures")


@pytest.fixture(scope="module")
def small(module):
    return module.small_models


# ---- what is trained ----------------------------------------------------------------------


@pytest.mark.parametrize("lesson", range(3))
def test_a_sequence_is_consistent(small, lesson: int) -> None:
    tokenizer = small.make_tokenizer()
    sequences = small.Sequences(tokenizer, 0)
    n_classes, n_words = small.LESSONS[lesson]
    class_of = {w: c for c, group in small.words().items() for w in group}
    labels = set()
    for ids in sequences.draw(60, small.LESSONS[lesson]):
        lines = tokenizer.decode(ids).strip("\n").split("\n")
        assert len(lines) == small.DEMONSTRATIONS
        pairs = [line.split(": ") for line in lines]
        said: dict[str, set[str]] = {}
        used: dict[str, set[str]] = {}
        for word, label in pairs:
            said.setdefault(class_of[word], set()).add(label)
            used.setdefault(class_of[word], set()).add(word)
        assert len(said) <= n_classes
        assert all(len(x) == 1 for x in said.values())  # a class has one label
        assert len(set.union(*said.values())) == len(said)  # and no other class has it
        assert max(map(len, used.values())) <= n_words
        labels |= said.get("class0", set())
    assert len(labels) > 1  # drawn anew in every sequence


def test_words_and_labels_are_tokens(small) -> None:
    tokenizer = small.make_tokenizer()
    first = next(iter(small.words().values()))[0]
    assert len(tokenizer(f"{first}: foo\n")["input_ids"]) == 3
    assert tokenizer.unk_token_id not in tokenizer(f"{first}: bar\n{first}:")["input_ids"]


@pytest.mark.parametrize("architecture", ["gpt2", "gptj", "neox", "llama"])
def test_training_is_decided_by_its_seed(
    small, architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(small, "LESSONS", small.LESSONS[-1:])
    monkeypatch.setattr(small, "DONE", 0.0)
    settings = small.SETTINGS | {"steps": 3, "batch": 4}
    models = []
    for number, seed in enumerate((0, 0, 1)):
        folder = tmp_path / str(number)
        folder.mkdir()
        found = small.train(architecture, seed, folder, settings)
        assert found["steps"] == 3
        models.append(tt.load(folder))
    assert {(m.n_layers, m.n_heads) for m in models} == {(4, 4)}
    states = [next(iter(m.module.state_dict().values())) for m in models]
    assert torch.equal(states[0], states[1])
    assert not torch.equal(states[0], states[2])


def test_a_training_that_fails_says_so(small, tmp_path: Path) -> None:
    with pytest.raises(
        tt.errors.FindingError, match="llama, seed 0: after 3 steps in lesson 1 of 3"
    ):
        small.train("llama", 0, tmp_path, small.SETTINGS | {"steps": 3, "batch": 4})
    assert not list(tmp_path.iterdir())


# ---- what is found ------------------------------------------------------------------------


def one_model(name: str, intact: float, left: float, random: float, auc: float) -> dict:
    """Groups of a model: accuracies, and the AUCs of the two heads that write."""
    rng = np.random.default_rng(2)
    right = np.stack([rng.random(60) < p for p in (intact, left, random)], axis=1).astype(float)
    scores = np.linspace(0.4, 0.6, 16).reshape(4, 4)
    scores[3, :2] = auc
    number = np.array([[(3, 0), (3, 1)], [(2, 0), (2, 1)]])
    dims = ("layer", "head")
    return {
        f"{name}-accuracy": xr.Dataset({"right": (("prompt", "condition"), right)}),
        f"{name}-scores": xr.Dataset({"qk_auc": (dims, scores), "ov_auc": (dims, scores)}),
        f"{name}-heads": xr.Dataset(
            {"number": (("kind", "rank", "part"), number)}, {"kind": ["writers", "in_context"]}
        ),
    }


@pytest.mark.parametrize(
    ("gpt2", "llama", "verdict"),
    [
        ((1.0, 0.5, 0.95, 0.9), (0.95, 0.4, 0.9, 0.8), "supported"),
        ((1.0, 0.5, 0.95, 0.9), (0.95, 0.4, 0.9, 0.5), "undecided"),  # no towers
        ((1.0, 0.5, 0.95, 0.9), (0.95, 0.9, 0.9, 0.9), "undecided"),  # no more than random heads
        ((1.0, 0.5, 0.95, 0.9), (0.95, 0.95, 0.4, 0.9), "not supported"),
        ((1.0, 0.5, 0.95, 0.9), (0.5, 0.5, 0.2, 0.9), "undecided"),  # cannot do the task
    ],
)
def test_verdicts(module, gpt2, llama, verdict: str) -> None:
    parts = one_model("gpt2", *gpt2) | one_model("llama", *llama)
    runs = [xr.DataTree.from_dict(parts)] * 3
    assert module.architectures(runs) == ["gpt2", "llama"]
    found = module.judge(runs)
    assert found.verdict == verdict
    assert found.numbers["gpt2: QK AUC, heads that write"] == pytest.approx(0.9)


def test_the_bound_is_over_all_pairs(module) -> None:
    runs = [xr.DataTree.from_dict(one_model("gpt2", 1.0, 0.5, 0.9, 0.9))]
    values = runs[0]["gpt2-scores"]["qk_auc"].values.ravel()
    means = [values[[i, j]].mean() for i in range(16) for j in range(i)]
    mean, bound = module.towers(runs, "gpt2", "qk_auc")
    assert mean == pytest.approx(0.9)
    assert bound == pytest.approx(np.quantile(means, 0.95))
