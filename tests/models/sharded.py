"""Models over several devices: the same numbers, and no operation across devices.

The devices are pretended (see `pretend`); everything else is as on a node with several GPUs. A
kind of device is given to torch once and for all, so these tests have a process of their own:

    python -m pytest tests/models/sharded.py
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import pretend
import pytest
import torch
from surface import MEASURES, REPEATED, same
from tiny import THREE, byte_level, crossed, hf_model, mixed, tiny

import twotower as tt
from twotower.models.model import device_of
from twotower.models.weights import hash_weights


@pytest.fixture(autouse=True)
def _devices() -> Iterator[None]:
    torch.set_num_threads(1)
    with pretend.devices():
        yield


@cache
def spread_out(name: str, n: int) -> tt.Model:
    return tt.load(pretend.spread_out(hf_model(name), n), tokenizer=byte_level())


@cache
def prompts(name: str) -> tt.Prompts:
    return tt.build_prompts(tiny(name), THREE, shots=1, n=2, seed=2)


@cache
def expected(name: str, what: str) -> object:
    return MEASURES[what](tiny(name), prompts(name))


@cache
def found(name: str, n: int, what: str) -> object:
    return MEASURES[what](spread_out(name, n), prompts(name))


@pytest.mark.parametrize("n", [pytest.param(2, marks=pytest.mark.slow), 4])
@pytest.mark.parametrize(
    ("name", "what"), crossed(MEASURES, ("analyze", "edits"), ("gpt2",), REPEATED)
)
def test_as_on_one_device(name: str, n: int, what: str) -> None:
    assert len(set(spread_out(name, n).device_map.values())) == n
    same(found(name, n, what), expected(name, what), 1e-5)


@pytest.mark.parametrize("name", mixed())
def test_mixers(name: str) -> None:
    same(found(name, 4, "last"), expected(name, "last"), 1e-5)


CROSSING = ("labels", "mean", "gradient", "frozen", "shares", "edits")
"""What `make test` looks at on a grouped-query Llama; elsewhere edits alone."""


def crossing() -> list[Any]:
    return [
        pytest.param(*case.values, marks=pytest.mark.slow)
        if case.values[1] not in CROSSING
        else case
        for case in crossed(MEASURES, ["edits"], ("gpt2",))
    ]


@pytest.mark.parametrize(("name", "what"), crossing())
def test_what_crosses(name: str, what: str) -> None:
    """Vectors of the residual stream, and results; no masks, no labels."""
    model, given = spread_out(name, 4), prompts(name)
    found(name, 4, what)  # what is made once, such as the labels' directions
    with pretend.transfers() as seen:
        MEASURES[what](model, given)
    across = [x for x in seen if x.source.type == pretend.NAME]
    assert across
    a, module = model.architecture, model.module
    ends = {device_of(part) for part in (a.final_norm(module), a.unembedding(module))}
    masks = {given.token_id.shape, (len(given),)}
    for copied in across:
        # The stream, counterfactual rows and GPT-2's position embedding; results at the end.
        vectors = copied.shape[-1] == model.d_model
        result = copied.to in ends and copied.shape not in masks
        assert vectors or result, copied


@pytest.mark.parametrize("name", ["gpt2", "llama-grouped"])
def test_the_same_hash_of_weights_on_any_devices(name: str) -> None:
    module = pretend.spread_out(hf_model(name), 4)
    assert len({device_of(part) for part in module.modules() if [*part.parameters()]}) > 1
    assert hash_weights(module) == hash_weights(hf_model(name))


def test_wrong_shapes_are_refused(pytestconfig: pytest.Config) -> None:
    """In all tests of this process, where jaxtyping checks what functions name."""
    from jaxtyping import TypeCheckError

    from twotower.walk.scores import _mean_before

    if not pytestconfig.getoption("jaxtyping_packages"):
        pytest.skip("shapes are not checked")
    at = torch.ones(2, 5, dtype=torch.bool)
    assert _mean_before(torch.zeros(1, 5, 1, 4), at).shape == (2, 5, 1, 4)
    with pytest.raises(TypeCheckError):
        _mean_before(torch.zeros(1, 5, 3, 4), at)
