"""The conditions under which a model is measured, made for the time of a measure.

Evaluation mode, no autocast, one thread at a time; and hooks of others run where the model runs,
not where a measure calls a module on vectors of its own. Afterwards everything is as the user
left it.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.modules import module as torch_modules

from ..errors import TwoTowerWarning
from .state import HOOKS, is_foreign

if TYPE_CHECKING:
    from .model import Model

_LOCK = threading.RLock()
"""nnsight keeps what it traces in globals: one measure at a time in a process."""

_measured: list[Any] = []
"""Models under way, innermost last."""


@contextmanager
def measuring(model: Model) -> Iterator[None]:
    """Conditions for measuring a model; within another such context of it, nothing happens."""
    with _LOCK:
        if any(one is model for one in _measured):
            yield
            return
        _measured.append(model)
        try:
            model.look()
            with ExitStack() as stack:
                stack.enter_context(_plain_arithmetic())
                if not model.remote:
                    modules = list(model.module.modules())
                    stack.enter_context(_evaluating(modules))
                    stack.enter_context(_not_compiled(modules))
                    stack.enter_context(_hooks_in_the_forward_only(modules))
                yield
        finally:
            _measured.pop()


@contextmanager
def _plain_arithmetic() -> Iterator[None]:
    """No autocast, which would round in a way that a model's dtype does not tell."""
    with ExitStack() as stack:
        devices = [x for x in ("cpu", "cuda", "mps", "xpu") if _autocast(x)]
        if devices:
            warnings.warn(
                "autocast is on, and measures do not follow it: they compute in the model's own "
                "dtype. Load or cast the model to the dtype that you want to measure",
                TwoTowerWarning,
                stacklevel=2,
            )
        for device in devices:
            stack.enter_context(torch.autocast(device, enabled=False))
        if torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.no_grad())
        yield


def _autocast(device: str) -> bool:
    try:
        return torch.is_autocast_enabled(device)
    except RuntimeError:  # a kind of device that this torch does not know
        return False


@contextmanager
def _evaluating(modules: list[torch.nn.Module]) -> Iterator[None]:
    """Every module in evaluation mode.

    The flag is set, not `eval()` called, which libraries override to do more.
    """
    training = [module for module in modules if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def _not_compiled(modules: list[torch.nn.Module]) -> Iterator[None]:
    """Modules that `module.compile()` compiled run as they are written; nnsight looks inside."""
    compiled = [(module, module._compiled_call_impl) for module in modules]
    compiled = [(module, call) for module, call in compiled if call is not None]
    for module, _ in compiled:
        module._compiled_call_impl = None
    try:
        yield
    finally:
        for module, call in compiled:
            module._compiled_call_impl = call


class _InTheForwardOnly:
    """A user's hook that is passed over where a measure calls the module.

    A measure calls modules on vectors laid out in its own way. A hook that counts positions
    would act on the wrong ones there, and one that collects would collect them. The code of a
    trace runs in a greenlet of its own, the model's forward in the caller's.
    """

    def __init__(self, hook: Callable[..., Any]) -> None:
        from greenlet import getcurrent

        self.hook, self.current, self.home = hook, getcurrent, getcurrent()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.hook(*args, **kwargs) if self.current() is self.home else None


@contextmanager
def _hooks_in_the_forward_only(modules: list[torch.nn.Module]) -> Iterator[None]:
    places = [getattr(torch_modules, f"_global{where}") for where in HOOKS]
    places += [getattr(module, where) for module in modules for where in HOOKS]
    wrapped = []
    for hooks in places:
        for key, hook in list(hooks.items()):
            if is_foreign(hook):
                hooks[key] = _InTheForwardOnly(hook)
                wrapped.append((hooks, key, hooks[key]))
    try:
        yield
    finally:
        for hooks, key, wrapper in wrapped:
            if hooks.get(key) is wrapper:  # a hook may have removed itself
                hooks[key] = wrapper.hook
