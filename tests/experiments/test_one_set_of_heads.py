"""One set of heads: the rule's verdicts, sharing, chance and kinds, by hand."""

from __future__ import annotations

import importlib

import numpy as np
import pytest
import xarray as xr

PART = importlib.import_module("experiments.one_set_of_heads")
EXPERIMENT = PART.EXPERIMENT
N, LAYERS, HEADS = 8, 30, 9
FORMS = {
    "labels": "classification",
    "labels 2": "classification",
    "pairs": "pairs",
    "pairs 2": "pairs",
    "chain": "completions",
    "chain 2": "completions",
    "classic": "classics",
}


def run(own: dict[str, float], seed: int, fit: float = 1.0) -> xr.DataTree:
    """A run in which effects are those of all forms and, by this weight, those of the form."""
    # Heads are the same in all seeds, and only the noise differs.
    model, noise = np.random.default_rng(0), np.random.default_rng(seed)
    common = model.standard_normal((LAYERS, HEADS))
    of_form = {
        form: model.standard_normal((LAYERS, HEADS)) for form in dict.fromkeys(FORMS.values())
    }
    drops = np.array(
        [
            (1 - own.get(form, 0)) * common + own.get(form, 0) * of_form[form]
            for form in FORMS.values()
        ]
    )
    drops = np.broadcast_to(drops[:, None, None], (len(FORMS), 2, N, LAYERS, HEADS))
    drops = drops + 0.3 * noise.standard_normal(drops.shape)
    right = np.broadcast_to((np.arange(N) < round(fit * N)).astype(float), drops.shape[:3])
    dims = ("task", "half", "prompt")
    effects = xr.Dataset(
        {
            "margin_drop": ((*dims, "layer", "head"), drops),
            "correct": (dims, right),
            "top1_correct": (dims, right),
            "n_classes": ("task", np.full(len(FORMS), 2)),
            "form": ("task", list(FORMS.values())),
        },
        {"task": list(FORMS), "half": ["first", "second"]},
    )
    named = np.full((LAYERS, HEADS), "", dtype=object)
    named[np.unravel_index(common.argmax(), common.shape)] = "induction, writer"
    kinds = xr.Dataset(
        {score: (("layer", "head"), common) for score in PART.SCORES}
        | {"kind": (("layer", "head"), named.astype(np.dtypes.StringDType()))}
    )
    return xr.DataTree.from_dict({"effects": effects, "kinds": kinds})


@pytest.mark.parametrize(
    ("own", "fit", "verdict"),
    [
        ({}, 1, "supported"),
        ({"completions": 1}, 1, "not supported"),
        ({"classics": 1}, 1, "supported"),  # they do not count
        ({}, 0.5, "undecided"),
    ],
)
def test_verdicts(own: dict[str, float], fit: float, verdict: str) -> None:
    judgement = EXPERIMENT.judge([run(own, seed, fit) for seed in range(3)])
    assert judgement.verdict == verdict, judgement.reason


def test_one_number_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_overlap(
        vectors: np.ndarray, forms: dict[str, str], leave: tuple = ()
    ) -> dict[tuple[str, str], float]:
        found = between(vectors, forms, leave)
        return {pair: 0.0 for pair in found} if vectors.max() == 1 else found

    between = PART.between
    monkeypatch.setattr(PART, "between", no_overlap)
    judgement = EXPERIMENT.judge([run({}, seed) for seed in range(3)])
    assert judgement.verdict == "undecided"


def test_numbers_and_tables() -> None:
    judgement = EXPERIMENT.judge([run({}, seed) for seed in range(3)])
    numbers, tables = judgement.numbers, judgement.tables
    assert numbers["classification: questions that the model can do"] == 2
    assert numbers["classification and pairs: rank correlation"] > 0.9
    expected = numbers["classification and pairs: heads in common, by chance within layers"]
    assert expected < numbers["classification and pairs: heads in common, 95% bound of chance"] < 4
    assert "(induction, writer)" in numbers["heads strongest of all three forms"]
    questions = tables["Every question"]
    assert [row[0] for row in questions["rows"]] == list(FORMS)
    assert {len(row) for row in questions["rows"]} == {len(questions["columns"])}
    kinds = tables["Strongest heads of the forms and their kinds"]
    rows = {row[0]: row[1:3] for row in kinds["rows"]}
    assert rows["heads"] == [270, numbers["heads among the 12 strongest of all three forms"]]
    assert rows["induction"] == [1, 1]


def test_features_and_blocks() -> None:
    """Dot products are numbers of common heads and Spearman's correlations."""
    from scipy.stats import spearmanr

    runs = [run({"pairs": 0.5}, seed) for seed in range(2)]
    tasks = ["labels", "pairs"]
    effects = [PART.effects_of(one, tasks) for one in runs]
    forms = {task: FORMS[task] for task in tasks}
    overlap = PART.between(PART.features(runs, tasks, PART.OVERLAP), forms)
    correlation = PART.between(PART.features(runs, tasks, PART.CORRELATION), forms)
    sides = [(one[0, half], one[1, 1 - half]) for one in effects for half in range(2)]
    sets = [[set(np.argsort(-side)[: PART.K]) for side in pair] for pair in sides]
    assert overlap["classification", "pairs"] == np.mean([len(a & b) for a, b in sets])
    assert correlation["classification", "pairs"] == pytest.approx(
        np.mean([spearmanr(*pair).statistic for pair in sides])
    )


def test_pairs_left_out() -> None:
    vectors = np.ones((1, 3, 2, 1))
    vectors[:, 2] = 3
    forms = {"a": "one", "b": "other", "c": "other"}
    assert PART.between(vectors, forms)["one", "other"] == 2
    left = PART.between(vectors, forms, leave=(("a", "c"), ("a", "elsewhere")))
    assert left["one", "other"] == 1


def test_depth_is_no_sharing() -> None:
    """Effects that depend on the layer only correlate no more than within layers."""
    depth = np.repeat(np.arange(LAYERS, dtype=float), HEADS)
    rng = np.random.default_rng(0)
    vectors = depth + 0.1 * rng.standard_normal((3, 2, 2, depth.size))
    vectors -= vectors.mean(axis=-1, keepdims=True)
    vectors /= np.linalg.norm(vectors, axis=-1, keepdims=True)
    forms = {"a": "one", "b": "other"}
    found = PART.between(vectors, forms)["one", "other"]
    expected, bound = PART.chance(vectors, forms, LAYERS)["one", "other"]
    assert found == pytest.approx(expected, abs=1e-3)
    assert bound == pytest.approx(found, abs=1e-3)
