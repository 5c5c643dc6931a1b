"""Every argument of every function of the surface, given something else, works or is refused.

A refusal is an error of the package, in one short line; never an error of Python, numpy or torch.
"""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import pytest
from surface import OF_MEASURES
from tiny import TWO

import twotower as tt

HEADS = [(2, 1)]
EXCEPT = ("at", "load", "open", "save")
"""Functions whose arguments are tested elsewhere: they read files, or make no use of a model."""


def functions() -> dict[str, Any]:
    """Functions of the surface and of its named submodules."""
    from_package = {name: getattr(tt, name) for name in tt.__all__}
    of_prompts = {name: getattr(tt.prompts, name) for name in tt.prompts.__all__}
    of_measures = {function.__name__: function for function in OF_MEASURES}
    found = from_package | of_prompts | of_measures
    return {name: value for name, value in found.items() if inspect.isfunction(value)}


@pytest.fixture(scope="module")
def given(llama: tt.Model) -> dict[str, tuple[Any, ...]]:
    """Arguments with which each function works."""
    prompts = tt.build_prompts(llama, TWO, labels=("foo", "bar"), shots=1, n=2)
    effects = tt.head_effects(llama, prompts)
    of, texts = (llama, prompts), ["a cat: foo", "b dog: bar"]
    known: dict[str, tuple[Any, ...]] = {
        "build_prompts": (llama, TWO),
        "bundled_pairs": (),
        "bundled_tasks": (),
        "causal_tracing": (*of, prompts.reversed_labels()),
        "circuit_heads": (effects,),
        "classic_prompts": (llama, "agreement"),
        "contrast": (llama, ["a cat:", "b dog:"], [" a", " b"], [" b", " a"]),
        "edge_effects": (*of, None, HEADS),
        "faithfulness": (*of, {"a": HEADS}),
        "function_vector": (*of, HEADS),
        "group_effects": (*of, [HEADS]),
        "in_context_heads": (effects,),
        "label_bias": (tt.predict(*of), ["foo", "bar"]),
        "load_pairs": ("capitals",),
        "load_task": ("animals-cities",),
        "majority_label": (prompts,),
        "margin_parts": (*of, HEADS),
        "pair_effects": (*of, [(1, 0), (2, 1)]),
        "prompts_from_strings": (llama, texts, [[(7, 10)], [(7, 10)]], ["foo", "bar"]),
        "score_parts": (*of, HEADS),
        "set_options": (),
        "towers_of": (*of, HEADS),
        "trace_effects": (*of, [" a", " b"]),
        "two_tower_scores": (tt.analyze(*of),),
        "vector_effects": (*of, [0.0] * llama.d_model),
    }
    return {name: known.get(name, of) for name in functions() if name not in EXCEPT}


def odd_values(effects: Any) -> list[Any]:
    texts, lists = ["first", ""], [[], {}, [None], [3], ["x"], (1, 2, 3), {"a": 3}]
    arrays = [np.zeros(3), effects]
    return [3, -1, 2.5, float("nan"), None, True, object(), *texts, *lists, *arrays]


def test_odd_arguments(given: dict[str, tuple[Any, ...]]) -> None:
    wrong = []
    effects = given["in_context_heads"][0]
    for name, arguments in given.items():
        function = functions()[name]
        parameters = inspect.signature(function).parameters.values()
        for place, parameter in enumerate(parameters):
            if parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
                continue
            for value in odd_values(effects):
                own, options = list(arguments), {}
                if place < len(own):
                    own[place] = value
                else:
                    options[parameter.name] = value
                at = f"{name}({parameter.name}={str(value)[:20]!r})"
                try:
                    function(*own, **options)
                except tt.TwoTowerError as error:
                    text = str(error)
                    if "\n" in text or len(text) > 1000:
                        wrong.append(f"{at}: {text[:60]!r} is no short line")
                except Exception as error:
                    wrong.append(f"{at}: {type(error).__name__}: {str(error)[:60]}")
    assert not wrong, f"{len(wrong)} raw errors:\n" + "\n".join(wrong)
