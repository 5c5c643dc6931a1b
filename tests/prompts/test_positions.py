"""Positions picked by role, label, class and demonstration, against plain loops."""

from __future__ import annotations

import numpy as np
import pytest
from tiny import THREE, tiny

import twotower as tt


@pytest.fixture(scope="module")
def prompts() -> tt.Prompts:
    return tt.build_prompts(tiny("gpt2"), THREE, shots=2, n=5, seed=3)


def by_hand(prompts: tt.Prompts, wanted) -> np.ndarray:
    found = np.zeros(prompts.token_id.shape, dtype=bool)
    for i, j in np.ndindex(found.shape):
        found[i, j] = prompts.token_id[i, j] >= 0 and wanted(i, j)
    return found


@pytest.mark.parametrize(
    ("asked", "wanted"),
    [
        ({"role": "label"}, lambda p, i, j: p.role[i, j] == "label"),
        ({"role": ["text", "last"]}, lambda p, i, j: p.role[i, j] in ("text", "last")),
        (
            {"role": "label", "label": "foo"},
            lambda p, i, j: p.role[i, j] == "label" and p.label_text[i, j] == "foo",
        ),
        ({"label": ("foo", "bar")}, lambda p, i, j: p.label_text[i, j] in ("foo", "bar")),
        ({"demonstration": 3}, lambda p, i, j: p.demonstration[i, j] == 3),
        ({"demonstration": [0, 5]}, lambda p, i, j: p.demonstration[i, j] in (0, 5)),
        (
            {"demonstration_class": "animal", "role": "text"},
            lambda p, i, j: p.demonstration_class[i, j] == "animal" and p.role[i, j] == "text",
        ),
        (
            {"role": "label", "same_class": True},
            lambda p, i, j: (
                p.role[i, j] == "label" and p.demonstration_class[i, j] == p.query_class[i]
            ),
        ),
        (
            {"same_class": False},
            lambda p, i, j: (
                p.demonstration[i, j] >= 0 and p.demonstration_class[i, j] != p.query_class[i]
            ),
        ),
    ],
)
def test_at(prompts: tt.Prompts, asked, wanted) -> None:
    found = tt.at(**asked).mask(prompts)
    expected = by_hand(prompts, lambda i, j: wanted(prompts, i, j))
    assert expected.any()
    assert not expected.all()
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({}, "needs a property"),
        ({"role": "pad"}, "padding cannot be selected"),
        ({"role": 3}, "must be a text"),
        ({"label": []}, "must be a text"),
        ({"label": [1]}, "must be a text"),
        ({"demonstration": "first"}, "must be a whole number"),
        ({"demonstration": -1}, "must be a whole number"),
        ({"same_class": "yes"}, "must be True or False"),
    ],
)
def test_refusals(asked, message: str) -> None:
    with pytest.raises(tt.errors.InputError, match=message):
        tt.at(**asked)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"label": "baz"}, "no position of the prompts has the label 'baz'"),
        ({"role": "labels"}, "no position of the prompts has the role 'labels'"),
        ({"demonstration": 6}, "no position of the prompts has the demonstration 6"),
        ({"demonstration_class": "plant"}, "has the demonstration class 'plant'"),
    ],
)
def test_what_stands_nowhere(prompts: tt.Prompts, asked, message: str) -> None:
    with pytest.raises(tt.errors.InputError, match=message):
        tt.at(**asked).mask(prompts)
