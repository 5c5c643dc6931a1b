"""Conditions under which a model is measured.

During a measure: evaluation mode, no autocast, one thread at a time. User hooks run in the model's
forward pass, but not when a measure calls a module on its own vectors. Afterwards the user's
settings are restored. Other threads may run the model meanwhile, in evaluation mode.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch

from ..errors import TwoTowerWarning
from .architecture import resolve
from .state import Hook, hooks_of

if TYPE_CHECKING:
    from .model import Model

_LOCK = threading.RLock()
"""nnsight keeps the traced model in globals, so a process runs one measure at a time."""

_measured: list[Any] = []
"""Models being measured, innermost last."""


_probing: list[bool] = []
"""Not empty while modules are probed; user hooks do not run then."""


@contextmanager
def probing() -> Iterator[None]:
    """Leave out user hooks in a forward whose values do not matter, of one token."""
    _probing.append(True)
    try:
        yield
    finally:
        _probing.pop()


def probe_inputs(model: Model) -> dict[str, Any]:
    """Return the arguments of a trace of one token, in which modules are called on probes."""
    token = torch.zeros((1, 1), dtype=torch.long, device=model.device)
    inputs = {"input_ids": token, "attention_mask": torch.ones_like(token)}
    where = {"remote": model.remote} if model.remote else {}
    return {**inputs, "use_cache": False, "return_dict": True, **where}


@contextmanager
def measuring(model: Model) -> Iterator[bool]:
    """Set the conditions for measuring a model; a nested context for the same model does nothing.

    Yields whether this context is the outermost one.
    """
    with _LOCK:
        if any(one is model for one in _measured):
            yield False
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
                    stack.enter_context(_named_outputs(model.module.config))
                    stack.enter_context(_hooks_watched(model))
                yield True
        finally:
            _measured.pop()


@contextmanager
def _plain_arithmetic() -> Iterator[None]:
    """Disable autocast and TF32, which round unlike the model's dtype, and a default device."""
    with ExitStack() as stack:
        stack.enter_context(_whole_float32())
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        devices = [x for x in ("cpu", "cuda", "mps", "xpu") if is_autocast(x)]
        if devices:
            warnings.warn(
                "autocast is on, but measures ignore it and compute in the model's own dtype. "
                "Load or cast the model in the dtype that you want to measure",
                TwoTowerWarning,
                stacklevel=2,
            )
        for device in devices:
            stack.enter_context(torch.autocast(device, enabled=False))
        if torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.no_grad())
        yield


@contextmanager
def _whole_float32() -> Iterator[None]:
    """Multiply float32 matrices in float32, whatever precision the user has allowed."""
    backends: Any = torch.backends
    general = getattr(backends, "fp32_precision", "none")  # newer settings, from torch 2.9 on
    try:
        known = torch.get_float32_matmul_precision()
    except RuntimeError:  # older and newer settings contradict each other
        known = ""
    if known and general == "none":
        if known != "highest":
            torch.set_float32_matmul_precision("highest")
        try:
            yield
        finally:
            if known != "highest":
                torch.set_float32_matmul_precision(known)
        return
    parts = [backends.cuda.matmul, backends.mkldnn.matmul]
    before = [part.fp32_precision for part in parts]
    for part in parts:
        part.fp32_precision = "ieee"
    try:
        yield
    finally:
        for part, precision in zip(parts, before, strict=True):
            part.fp32_precision = "none" if precision == general else precision


def is_autocast(device: str) -> bool:
    """Return whether autocast is on for a kind of device."""
    try:
        return torch.is_autocast_enabled(device)
    except RuntimeError:  # unknown to this version of torch
        return False


@contextmanager
def _evaluating(modules: list[torch.nn.Module]) -> Iterator[None]:
    """Set every module to evaluation mode.

    Sets the flag instead of calling `eval()`, which some libraries override.
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
    """Run modules compiled by `module.compile()` uncompiled, because nnsight looks inside."""
    compiled = [(module, module._compiled_call_impl) for module in modules]
    compiled = [(module, call) for module, call in compiled if call is not None]
    for module, _ in compiled:
        module._compiled_call_impl = None
    try:
        yield
    finally:
        for module, call in compiled:
            module._compiled_call_impl = call


@contextmanager
def _named_outputs(config: Any) -> Iterator[None]:
    """Return outputs by name even if the configuration asks for tuples; transformers needs them."""
    if getattr(config, "return_dict", True):
        yield
        return
    config.return_dict = True
    try:
        yield
    finally:
        config.return_dict = False


class _Watched:
    """A wrapper that records whether a user's hook changes anything.

    It skips the hook when a measure calls the module on its own vectors. Their layout differs, so
    a hook that counts positions would act on the wrong ones, and a hook that collects activations
    would collect them. A trace runs in its own greenlet; the model's forward pass runs in the
    caller's. Forwards of other threads are none of the measure's.
    """

    def __init__(self, hook: Hook, places: Mapping[int, str], acting: list[str]) -> None:
        from greenlet import getcurrent

        self.hook, self.places, self.acting = hook, places, acting
        self.current, self.home, self.thread = getcurrent, getcurrent(), threading.get_ident()

    def __call__(self, module: torch.nn.Module, *given: Any) -> Any:
        if threading.get_ident() != self.thread:
            return self.hook.function(module, *given)
        if _probing or self.current() is not self.home:
            return None
        if id(module) not in self.places:
            return self.hook.function(module, *given)
        before = [(tensor, _version(tensor)) for tensor in _tensors(given)]
        replaced = [*map(id, _tensors(given if self.hook.is_before else given[-1]))]
        result = self.hook.function(module, *given)
        changed = any(_version(tensor) != version for tensor, version in before)
        if changed or (result is not None and [*map(id, _tensors(result))] != replaced):
            here = self.places[id(module)]
            at = "" if self.hook.path == here else f", acting on {here}"
            if f"{self.hook}{at}" not in self.acting:
                self.acting.append(f"{self.hook}{at}")
        return result


def _tensors(x: Any) -> Iterator[torch.Tensor]:
    """Iterate over the tensors in a module's inputs or outputs."""
    if isinstance(x, torch.Tensor):
        yield x
    elif isinstance(x, (Mapping, tuple, list)):
        for value in x.values() if isinstance(x, Mapping) else x:
            yield from _tensors(value)


def _version(tensor: torch.Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version


@contextmanager
def _hooks_watched(model: Model) -> Iterator[None]:
    """Run user hooks only in the model's forward pass, and record those that change its values.

    Hooks before the first block are not recorded: measures take its input as given.
    """
    root, architecture = model.module, model.architecture
    named = list(root.named_modules())
    blocks = resolve(root, architecture.layers_path)
    read = {id(architecture.final_norm(root)), id(architecture.unembedding(root))}
    read |= {id(module) for module in blocks.modules()}
    around = {id(module) for _, module in named if any(x is blocks for x in module.modules())}
    after = {id(module): path for path, module in named if id(module) in read | around}
    before = {id(module): path for path, module in named if id(module) in read}
    wrapped = []
    for hooks, key, hook in hooks_of(named):
        wrapper = _Watched(hook, before if hook.is_before else after, model.acting)
        hooks[key] = wrapper
        wrapped.append((hooks, key, wrapper))
    try:
        yield
    finally:
        for hooks, key, wrapper in wrapped:
            if hooks.get(key) is wrapper:  # a hook may have removed itself
                hooks[key] = wrapper.hook.function
