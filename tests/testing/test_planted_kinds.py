"""Planted heads get the names of what they are, and distractors none."""

from __future__ import annotations

import numpy as np
import pytest

import twotower as tt
from twotower.testing.kinds import ARCHITECTURES, N_HEADS, PLACES, PlantedKinds


def moved(by: int) -> dict[str, tt.Head]:
    """The default places, with heads of a layer turned around."""
    return {kind: tt.Head(x.layer, (x.head + by) % N_HEADS) for kind, x in PLACES.items()}


@pytest.fixture(scope="module", params=enumerate(ARCHITECTURES), ids=ARCHITECTURES)
def planted(request: pytest.FixtureRequest) -> tuple[PlantedKinds, tt.Model, tt.Prompts]:
    number, name = request.param
    planting = PlantedKinds(name, moved(number), noise=0.05, seed=number)
    model = planting.load()
    return planting, model, planting.prompts(model, n=16)


def test_every_head_is_named_as_what_it_is(planted) -> None:
    planting, model, prompts = planted
    found = tt.head_kinds(model, prompts, n=6)["kind"]
    for head, expected in planting.expected.items():
        names = str(found.sel(layer=head.layer, head=head.head).item()).split(", ")
        assert set(names) - {""} == expected, head


def test_the_task_needs_the_planted_heads(planted) -> None:
    planting, model, prompts = planted
    assert tt.predict(model, prompts).top1_correct.values.all()
    shuffled = prompts.shuffled_labels()
    assert tt.predict(model, shuffled).top1_correct.mean() < 0.4
    # The function vector alone does the task without demonstrations that show it.
    vector = tt.function_vector(model, prompts, [planting.places["function vector"]])
    steered = tt.predict(model, shuffled, tt.Add(vector, 2))
    assert steered.top1_correct.values.all()
    others = [x for x, names in planting.expected.items() if not names]
    others.remove(planting.places["checking"])
    edits = [tt.KnockOut(others, positions="all")]
    assert tt.predict(model, prompts, edits).top1_correct.values.all()


def test_the_suppressor_lowers_the_answer(planted) -> None:
    planting, model, prompts = planted
    drop = tt.head_effects(model, prompts, logprobs=False).margin_drop.mean("prompt")
    strength = np.argsort(drop.values, axis=None)
    least = tt.Head(*map(int, np.unravel_index(strength[0], drop.shape)))
    assert least == planting.places["suppressor"]
