"""Biases against counting by hand, and reductions that are not reported."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import xarray as xr
from tiny import THREE, TWO

import twotower as tt
from twotower.measures.bias import bias_reduction, majority_label, recent_label
from twotower.statistics import reduction

FAVOURED = ["foo", "foo", "bar"] * 3


@pytest.fixture(scope="module")
def three(llama: tt.Model) -> tt.Prompts:
    shots = {"foo": 3, "bar": 1, "map": 2}
    return tt.build_prompts(llama, THREE, shots=shots, n=9, seed=3)


@pytest.fixture(scope="module")
def answers(llama: tt.Model, three: tt.Prompts) -> xr.Dataset:
    return tt.predict(llama, three)


def made(answers: xr.Dataset, logits: list[list[float]]) -> xr.Dataset:
    """The answers with other logits, of as many prompts as there are rows."""
    some = answers.isel(prompt=slice(len(logits))).copy()
    return some.assign(logit=(("prompt", "label"), np.array(logits), answers["logit"].attrs))


def test_bias_by_hand(answers: xr.Dataset) -> None:
    logits = [[3.0, 1.0, 0.0], [1.0, 5.0, 0.0], [0.0, 0.0, 1.0]]
    found = tt.label_bias(made(answers, logits), ["foo", "foo", "map"])
    assert found["logit_bias"].values.tolist() == [2.5, -1.5, 1.0]
    np.testing.assert_allclose(found["count_bias"].values, [2 / 3, -1 / 3, 2 / 3])
    assert found["favoured"].values.tolist() == ["foo", "foo", "map"]


def test_bias_of_predictions(answers: xr.Dataset, three: tt.Prompts) -> None:
    favoured = tt.majority_label(three)
    found = tt.label_bias(answers, favoured)
    for i, label in enumerate(favoured):
        logit = {name: float(answers["logit"].sel(label=name)[i]) for name in three.labels}
        others = [value for name, value in logit.items() if name != label]
        by_hand = logit[label] - sum(others) / 2
        assert float(found["logit_bias"][i]) == pytest.approx(by_hand, rel=1e-5)
        wins = max(logit, key=logit.get) == label
        assert float(found["count_bias"][i]) == pytest.approx(wins - 1 / 3)
    assert found.attrs["prompts_hash"] == three.hash


def test_right_answers_on_both_sides_cancel(llama: tt.Model) -> None:
    # A model that is always right has no count bias: favoured labels are right half the time.
    prompts = tt.build_prompts(llama, TWO, shots={"foo": 4, "bar": 1}, n=8, seed=0)
    answers = tt.predict(llama, prompts)
    right = np.where(np.array(prompts.labels)[None] == prompts.gold[:, None], 1.0, 0.0)
    answers = answers.assign(logit=(("prompt", "label"), right, answers["logit"].attrs))
    found = tt.label_bias(answers, tt.majority_label(prompts))
    assert float(found["count_bias"].mean()) == 0
    assert float(found["logit_bias"].mean()) == 0


@pytest.mark.parametrize("more", ["foo", "bar"])
def test_majority_is_read_from_the_prompts(llama: tt.Model, more: str) -> None:
    shots = {"foo": 1, "bar": 1} | {more: 4}
    prompts = tt.build_prompts(llama, TWO, shots=shots, n=4, seed=0)
    assert tt.majority_label(prompts).tolist() == [more] * 4


def test_recent_label_follows_the_rotation_of_labels(llama: tt.Model) -> None:
    prompts = tt.build_prompts(llama, TWO, shots=3, n=8, seed=0, order="blocked")
    found = recent_label(prompts)
    for prompt, label in zip(prompts.strings, found, strict=True):
        assert prompt.splitlines()[-2].endswith(f": {label}")
    assert set(found) == {"foo", "bar"}


def test_reductions(answers: xr.Dataset) -> None:
    before = tt.label_bias(made(answers, [[4.0, 0, 0], [3.0, 0, 0], [0, 2.0, 0]] * 3), FAVOURED)
    after = tt.label_bias(made(answers, [[2.0, 0, 0], [1.0, 0, 0], [0, 1.0, 0]] * 3), FAVOURED)
    found = bias_reduction(before, after)
    # Each favoured label has the same part: (3.5 + 2) / 2 before, (1.5 + 1) / 2 after.
    assert found.value == pytest.approx(1 - 1.25 / 2.75)
    assert found.low < found.value < found.high
    assert found.n == 9
    assert bias_reduction(before, before).value == 0
    assert bias_reduction(before, after, "count_bias").value == 0


def test_a_reduction_of_no_bias_is_not_reported(answers: xr.Dataset) -> None:
    before = tt.label_bias(made(answers, [[1.0, 0, 0], [-1.0, 0, 0], [0, 0.1, 0]] * 3), FAVOURED)
    assert bias_reduction(before, before) is None


def test_resamples_without_any_bias_do_not_count() -> None:
    before, after = np.array([1.0] * 4 + [0.0] * 8), np.zeros(12)
    found = reduction(before, after)  # some resamples hold nothing but zeros: 0 of 0
    assert found == (1.0, 1.0, 1.0, 12)
    assert reduction(-before, -before / 2).value == 0.5


def test_what_is_refused(answers: xr.Dataset, three: tt.Prompts, llama: tt.Model) -> None:
    with pytest.raises(tt.errors.InputError, match="the result of predict"):
        tt.label_bias(answers.drop_vars(["logit", "logprob"]), FAVOURED)
    with pytest.raises(tt.errors.InputError, match="must be a list"):
        tt.label_bias(answers, "foo")
    with pytest.raises(tt.errors.InputError, match="'cat' is not among foo, bar, map"):
        tt.label_bias(answers, ["cat", *FAVOURED[1:]])
    even = tt.build_prompts(llama, TWO, shots=2, n=2, seed=0)
    with pytest.raises(tt.errors.InputError, match="prompt 0 has no most frequent label"):
        tt.majority_label(even)
    bias = tt.label_bias(answers, FAVOURED)
    with pytest.raises(tt.errors.InputError, match="kind='margin' is not known"):
        bias_reduction(bias, bias, "margin")
    with pytest.raises(tt.errors.InputError, match="towards other labels"):
        bias_reduction(bias, tt.label_bias(answers, ["map"] * 9))


def test_none_without_demonstrations(llama: tt.Model) -> None:
    bare = tt.prompts_from_strings(llama, ["cat:"], [[]], ["foo"], ["foo", "bar"])
    with pytest.raises(tt.errors.InputError, match="has no demonstrations"):
        recent_label(bare)


def test_bias_is_saved_and_opened(answers: xr.Dataset, tmp_path: Path) -> None:
    bias = tt.label_bias(answers, FAVOURED)
    tt.save(bias, tmp_path / "bias.zarr")
    back = tt.open(tmp_path / "bias.zarr")["bias"].to_dataset()
    xr.testing.assert_equal(back, bias)


def test_labels_of_several_tokens_count_once(llama: tt.Model) -> None:
    shots = {"foo": 2, "elephant": 1}
    prompts = tt.build_prompts(llama, TWO, labels=("foo", "elephant"), shots=shots, n=4, seed=0)
    held = prompts.label_text[prompts.where("labels")]
    assert (held == "elephant").sum() > 2 * (held == "foo").sum()
    assert majority_label(prompts).tolist() == ["foo"] * 4
    last = [[x.label for x in prompt.segments if x.role == "label"][-1] for prompt in prompts.items]
    assert recent_label(prompts).tolist() == last
    even = tt.build_prompts(llama, TWO, labels=("foo", "elephant"), shots=2, n=2, seed=0)
    with pytest.raises(tt.errors.InputError, match="'foo': 2, 'elephant': 2"):
        majority_label(even)


def test_favoured_labels_that_name_their_prompts(answers: xr.Dataset) -> None:
    """They are put in the order of the predictions."""
    favoured = xr.DataArray(FAVOURED, {"prompt": answers["prompt"]}, "prompt")
    expected = tt.label_bias(answers, FAVOURED)
    found = tt.label_bias(answers, favoured.sortby("prompt", ascending=False))
    xr.testing.assert_equal(found, expected)
    with pytest.raises(tt.errors.InputError, match="names other prompts"):
        tt.label_bias(answers, favoured.assign_coords(prompt=favoured["prompt"] + 1))
