"""What users put in force on a model beside this package: hooks, methods, edits of nnsight's."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.modules import module as torch_modules

import twotower as tt

Change = Callable[[torch.Tensor], torch.Tensor]


def shift(x: torch.Tensor) -> torch.Tensor:
    return x + 0.5 * torch.sin(torch.arange(x.shape[-1], dtype=x.dtype))


def at_last(x: torch.Tensor) -> torch.Tensor:
    return torch.cat((x[:, :-1], shift(x[:, -1:])), dim=1)


def before_last(x: torch.Tensor) -> torch.Tensor:
    return torch.cat((x[:, :-3], shift(x[:, -3:-2]), x[:, -2:]), dim=1)


def in_place(x: torch.Tensor) -> torch.Tensor:
    return x.mul_(1.1)


def clip(x: torch.Tensor) -> torch.Tensor:
    """Nothing in most forwards; something where a knock-out makes values larger."""
    return x.clamp(-3.0, 3.0)


def observe(x: torch.Tensor) -> None:
    return None


def same(x: torch.Tensor) -> torch.Tensor:
    return x


CHANGES: list[Change] = [shift, at_last, before_last, in_place, clip]
OBSERVERS: list[Any] = [observe, same]


def changed(value: Any, change: Any) -> Any:
    """What a module takes or gives, its first stream of vectors changed; None for no change."""
    if isinstance(value, torch.Tensor):
        is_stream = value.dim() == 3 and value.dtype.is_floating_point
        return change(value) if is_stream else None
    if hasattr(value, "logits"):
        new = change(value.logits)
        if new is not None:
            value.logits = new
        return None if new is None else value
    if hasattr(value, "last_hidden_state"):
        new = change(value.last_hidden_state)
        if new is not None:
            value.last_hidden_state = new
        return None if new is None else value
    if isinstance(value, tuple) and value:
        new = changed(value[0], change)
        return None if new is None else (new, *value[1:])
    return None


def hook_on(module: torch.nn.Module, change: Any, before: bool, with_kwargs: bool, first: bool):
    """A hook of one of torch's kinds, registered."""

    def after(module: Any, *given: Any) -> Any:
        return changed(given[-1], change)

    def ahead(module: Any, inputs: Any) -> Any:
        return changed(inputs, change)

    def ahead_with_kwargs(module: Any, inputs: Any, options: Any) -> Any:
        new = changed(inputs, change)
        if new is not None:
            return new, options
        states = options.get("hidden_states")
        new = None if states is None else changed(states, change)
        return None if new is None else (inputs, {**options, "hidden_states": new})

    options: dict[str, Any] = {"with_kwargs": with_kwargs, "prepend": first}
    if not before:
        return module.register_forward_hook(after, **options)
    hook = ahead_with_kwargs if with_kwargs else ahead
    return module.register_forward_pre_hook(hook, **options)


def global_hook(kind: type, change: Any, before: bool):
    """A hook on all modules, which acts on those of a kind alone."""

    def after(module: Any, inputs: Any, output: Any) -> Any:
        return changed(output, change) if isinstance(module, kind) else None

    def ahead(module: Any, inputs: Any) -> Any:
        return changed(inputs, change) if isinstance(module, kind) else None

    if before:
        return torch_modules.register_module_forward_pre_hook(ahead)
    return torch_modules.register_module_forward_hook(after)


def replaced_forward(module: Any, how: str, change: Any) -> Callable[[], None]:
    """Put another method in the place of `forward`; returns what takes it out again."""
    original = module.forward

    def around(*inputs: Any, **options: Any) -> Any:
        found = original(*inputs, **options)
        new = changed(found, change)
        return found if new is None else new

    def instead(x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(x)

    module.forward = {
        "around": around,
        "wrapped": functools.wraps(original)(around),
        "instead": instead,
    }[how]

    def undo() -> None:
        if how == "around":
            module.forward = original
        else:
            del module.forward

    return undo


def _edit_mlp(model: tt.Model) -> None:
    traced, block = model.traced, model.architecture.layers(model.traced)[1]
    with traced.edit(inplace=True):
        block.mlp.output[:, -1] += 0.7


def _edit_projection(model: tt.Model) -> None:
    traced, block = model.traced, model.architecture.layers(model.traced)[0]
    projection = model.architecture.projection(block)
    with traced.edit(inplace=True):
        projection.input = projection.input * 1.2


def _edit_values(model: tt.Model) -> None:
    traced, block = model.traced, model.architecture.layers(model.traced)[1]
    last = model.architecture.qkv(block)[-1]
    with traced.edit(inplace=True):
        last.output = last.output * 1.3


def _edit_embedding(model: tt.Model) -> None:
    traced, first = model.traced, model.architecture.layers(model.traced)[0]
    with traced.edit(inplace=True):
        first.input = first.input * 1.1


def _edit_other_tokens(model: tt.Model) -> None:
    traced = model.traced
    with traced.edit(inplace=True):
        traced.lm_head.output[..., :8] += 9.0


EDITS = {
    "mlp": _edit_mlp,
    "projection": _edit_projection,
    "values": _edit_values,
    "embedding": _edit_embedding,
    "other tokens": _edit_other_tokens,
}
