"""Keeping nnsight's wrapper in line with the model inside, which its user may rebuild.

nnsight mirrors a model's modules when it wraps it, and puts a method of its own in the place of
each module's `forward`. Adapters added or taken out later replace modules; users replace `forward`,
or delete it to have the class's own back. Neither tells nnsight, whose traces would then read
modules that no longer run, or wait for modules that no longer report.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from nnsight.intervention.source import STATE, Controller, State, module_body

from ..errors import ModelError


def renew_methods(root: torch.nn.Module) -> None:
    """Put nnsight's method back around each `forward` that was replaced or deleted."""
    for module in root.modules():
        state = module.__dict__.get(STATE)
        if state is None or "_hf_hook" in module.__dict__:  # accelerate's own replacement
            continue
        method = module.__dict__.get("forward")
        if not isinstance(method, Controller):
            new = State(module_body(module))
            module.__dict__["forward"] = Controller(module, new)
        elif method.state is not state:  # one of nnsight's, put back after a replacement
            new = method.state
        else:
            continue
        # The old method may still be called by the new one; it must not report a second time.
        new.routes, state.routes = state.routes, []
        module.__dict__[STATE] = new


def renew_modules(traced: Any, architecture: Any) -> None:
    """Mirror the modules anew where some were replaced.

    Raises
    ------
    ModelError
        If the model no longer has the layout that its adapter describes.
    """
    root = traced._module
    if _mirrors(traced):
        return
    reason = architecture.misfit(root)
    if reason is not None:
        raise ModelError(
            f"modules of the model were replaced since it was loaded, and {reason}; put them "
            "back, or load the model again"
        )
    with warnings.catch_warnings():
        # It says that methods were replaced, which the state of the model names.
        warnings.simplefilter("ignore")
        traced._update(root)


def _mirrors(envoy: Any) -> bool:
    """Whether an envoy and those below it stand for the modules that are there now."""
    own = envoy._module._modules
    mirrored = envoy._child_map
    present = [name for name, module in own.items() if module is not None]
    return present == list(mirrored) and all(
        mirrored[name]._module is own[name] and _mirrors(mirrored[name]) for name in present
    )
