"""Update nnsight's wrapper when the user changes the model inside.

When nnsight wraps a model, it mirrors its modules and replaces each module's `forward` with its own
method. Later, users may add or remove adapters, which replaces modules. They may also replace
`forward`, or delete it to restore the class's method. nnsight does not notice: its traces would
read modules that no longer run, or wait for modules that no longer report.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import combinations
from typing import Any
from weakref import WeakKeyDictionary

import torch
from nnsight.intervention.interleaver import OutOfOrderError
from nnsight.intervention.source import STATE, Controller, State, module_body

from ..errors import ModelError
from .fit import misfit

_of_class: WeakKeyDictionary[torch.nn.Module, Any] = WeakKeyDictionary()
"""Methods of their classes that nnsight has wrapped, by module."""


def renew_methods(root: torch.nn.Module) -> None:
    """Wrap every replaced or deleted `forward`, also of a class, with nnsight's method again."""
    for module in root.modules():
        state = module.__dict__.get(STATE)
        if state is None or "_hf_hook" in module.__dict__:  # accelerate's own replacement
            continue
        method = module.__dict__.get("forward")
        of_class = type(module).forward
        if _of_class.get(module) is state.original is not of_class:  # the class changed
            module.__dict__.pop("forward", None)
            method, _of_class[module] = None, of_class
        elif state.original is of_class:
            _of_class[module] = of_class
        if not isinstance(method, Controller):
            new = State(module_body(module))
            module.__dict__["forward"] = Controller(module, new)
        elif method.state is not state:  # nnsight's method, restored after a replacement
            new = method.state
        else:
            continue
        # The new method may call the old one, which must not report a second time.
        new.routes, state.routes = state.routes, []
        module.__dict__[STATE] = new


def renew_modules(traced: Any, architecture: Any) -> None:
    """Update nnsight's mirror of the modules if some were replaced.

    Raises
    ------
    ModelError
        If the model no longer has its adapter's layout.
    """
    root = traced._module
    blocks = [*architecture.layers(root)]
    if len(blocks) != architecture.n_layers:
        raise ModelError(
            f"the model has {len(blocks)} layers, and its configuration says "
            f"{architecture.n_layers}; if one was changed after loading, load the model again"
        )
    if _mirrors(traced):
        return
    for block, other in combinations(blocks, 2):
        shared = set(block.modules()) & set(other.modules())
        if shared:
            raise ModelError(
                f"two layers share a module ({type(next(iter(shared))).__name__}), which nnsight "
                "cannot tell apart; copy the module (copy.deepcopy), or load the model again"
            )
    reason = misfit(type(architecture), root)
    if reason is not None:
        raise ModelError(
            f"modules of the model were replaced after loading, and {reason}; put them "
            "back, or load the model again"
        )
    with warnings.catch_warnings():
        # nnsight warns about replaced methods; the model's state already lists them.
        warnings.simplefilter("ignore")
        traced._update(root)


@contextmanager
def in_order(name: str) -> Iterator[None]:
    """Explain that a module did not run where the adapter of a model says.

    Raises
    ------
    ModelError
        Instead of nnsight's error.
    """
    try:
        yield
    except OutOfOrderError as error:
        what = str(error).partition("\n")[0]
        raise ModelError(
            f"{name}: a module does not run where its adapter says ({what}). If modules or their "
            "methods were exchanged after loading, put them back or load the model again"
        ) from error


def _mirrors(envoy: Any) -> bool:
    """Check that an envoy and its children mirror the current modules."""
    own = envoy._module._modules
    mirrored = envoy._child_map
    present = [name for name, module in own.items() if module is not None]
    return present == list(mirrored) and all(
        mirrored[name]._module is own[name] and _mirrors(mirrored[name]) for name in present
    )
