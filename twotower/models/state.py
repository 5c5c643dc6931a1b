"""The state of a model: all that decides its numbers, as it is now.

Users train a model, load other weights into it, hook it, adapt it, cast it. Before each measure
its state is taken; where it differs from that of the measure before, whatever was derived from
the old one is thrown away and the model is proved anew.

Taking it must be cheap, so weights are not read whole. A weight is known by its tensor, the
version that autograd counts with each change in place, and a sample of its elements, which
changes where the version does not (`weight.data`). A change that all three miss, a few elements
written through `.data`, is left to the proof of the batch.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.modules import module as torch_modules

if TYPE_CHECKING:
    from .model import Model

SAMPLES = 64
"""Elements of each weight that are looked at, spread evenly over it."""

FRAMEWORKS = (
    "accelerate",
    "bitsandbytes",
    "nnsight",
    "peft",
    "torch",
    "transformers",
    "twotower",
)
"""Packages whose hooks are part of how a model runs, such as those that move weights."""

HOOKS = {"_forward_hooks": "forward hook", "_forward_pre_hooks": "forward pre-hook"}
"""Where torch keeps a module's hooks, and their names."""

FORWARD = "forward"
"""Kind of what was put in the place of the method of this name."""


@dataclass(frozen=True)
class Hook:
    """A hook that somebody put on a module.

    Attributes
    ----------
    path
        Of the module; "every module" for torch's global hooks.
    kind
        "forward hook", "forward pre-hook", or "forward" where the method itself was replaced.
    name
        Of the function, with its module.
    identity
        Of the function object.
    function
        Held, so that no other one gets its identity.
    """

    path: str
    kind: str
    name: str
    identity: int
    function: Any = field(compare=False, repr=False)

    @property
    def is_before(self) -> bool:
        """Whether it is given what goes into a module, not what comes out."""
        return self.kind == HOOKS["_forward_pre_hooks"]

    def __str__(self) -> str:
        return f"{self.kind} {self.name} on {self.path or 'the model'}"


@dataclass(frozen=True)
class State:
    """What decides a model's numbers.

    Attributes
    ----------
    identity
        Hash of identities of all modules and edits, and of identities and versions of all
        weights and buffers.
    sample
        Hash of elements sampled from them: the same for the same weights in any process.
    hooks
        Hooks of others.
    edits
        nnsight edits in force, by where they were written.
    adapters
        For each adapted module its active, merged and disabled adapters and their scales.
    kernel
        Attention implementation.
    dtypes
        Of the weights and buffers, most frequent first.
    held
        Edits, so that no other ones get their identities.
    """

    identity: str
    sample: str
    hooks: tuple[Hook, ...]
    edits: tuple[str, ...]
    adapters: tuple[Any, ...]
    kernel: str | None
    dtypes: tuple[str, ...]
    held: tuple[Any, ...] = field(default=(), compare=False, repr=False)

    def differences(self, other: State) -> list[str]:
        """In what another state differs from this one; names of parts."""
        parts = {"weights": "sample", "attention kernel": "kernel"}
        parts |= {name: name for name in ("hooks", "edits", "adapters", "dtypes")}
        return [name for name, at in parts.items() if getattr(self, at) != getattr(other, at)]

    def unfollowed(self) -> list[str]:
        """Interventions of others that a sweep's rows cannot follow whatever they do, in words.

        An edit is part of traces only. A method may count positions, and rows lie otherwise.
        """
        found = [str(hook) for hook in self.hooks if hook.kind == FORWARD]
        return found + [f"nnsight edit {edit}" for edit in self.edits]

    def interventions(self) -> list[str]:
        """Interventions of others, in words."""
        found = [str(hook) for hook in self.hooks]
        return found + [f"nnsight edit {edit}" for edit in self.edits]


def take_state(model: Model) -> State:
    """The state of a model as it is now.

    On a server only its edits are known.
    """
    root = model.module
    modules = list(root.named_modules(remove_duplicate=True))
    tensors = [] if model.remote else list(_tensors(modules))
    edits = getattr(model.traced, "_edits", ())
    return State(
        _hash([*map(_identity, tensors), *map(id, edits), *(id(module) for _, module in modules)]),
        _sample(tensors),
        (*(hook for _, _, hook in hooks_of(modules)), *_replaced(modules)),
        tuple(map(_written_at, edits)),
        tuple(_adapters(modules)),
        model.attention_kernel,
        _dtypes(tensors),
        tuple(edits),
    )


def _tensors(modules: list[tuple[str, torch.nn.Module]]) -> Iterator[torch.Tensor]:
    for _, module in modules:
        for tensor in itertools.chain(module._parameters.values(), module._buffers.values()):
            if tensor is not None:
                yield tensor


def _identity(tensor: torch.Tensor) -> tuple[Any, ...]:
    form = (tensor.dtype, tensor.shape, tensor.device)
    if tensor.is_meta:  # an offloaded weight: another tensor after each forward
        return form
    version = -1 if tensor.is_inference() else tensor._version
    return id(tensor), version, tensor.data_ptr(), *form


def _hash(values: Any) -> str:
    return hashlib.blake2b(repr(tuple(values)).encode(), digest_size=16).hexdigest()


def _sample(tensors: list[torch.Tensor]) -> str:
    """Hash of some elements of every tensor; one copy from each device and dtype."""
    found = hashlib.blake2b(digest_size=16)
    groups: dict[tuple[torch.device, torch.dtype], list[torch.Tensor]] = {}
    for tensor in tensors:
        # An offloaded weight is on "meta" until it is needed.
        if tensor.is_meta or not tensor.numel():
            continue
        taken = _spread(tensor.data)
        groups.setdefault((tensor.device, tensor.dtype), []).append(taken)
    for (_, dtype), parts in groups.items():
        joined = torch.cat(parts).cpu()
        found.update(str(dtype).encode())
        found.update(joined.view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def _spread(tensor: torch.Tensor) -> torch.Tensor:
    """Elements spread evenly over the memory that a tensor spans."""
    span = tensor.numel()
    if not tensor.is_contiguous():
        steps = zip(tensor.shape, tensor.stride(), strict=True)
        span = 1 + sum((n - 1) * step for n, step in steps)
    n = min(SAMPLES, span)
    return tensor.as_strided((n,), (max(1, (span - 1) // max(1, n - 1)),))


def _dtypes(tensors: list[torch.Tensor]) -> tuple[str, ...]:
    counts: dict[str, int] = {}
    for tensor in tensors:
        name = str(tensor.dtype).removeprefix("torch.")
        counts[name] = counts.get(name, 0) + tensor.numel()
    return tuple(sorted(counts, key=lambda name: -counts[name]))


def hooks_of(
    modules: list[tuple[str, torch.nn.Module]],
) -> Iterator[tuple[dict[int, Any], int, Hook]]:
    """Hooks of others on modules and on all modules, each with its place in torch's dicts."""
    for where, kind in HOOKS.items():
        places = [("every module", getattr(torch_modules, f"_global{where}"))]
        places += [(path, getattr(module, where)) for path, module in modules]
        for path, hooks in places:
            for key, function in list(hooks.items()):
                if is_foreign(function):
                    yield hooks, key, _hook(path, kind, function)


def _replaced(modules: list[tuple[str, torch.nn.Module]]) -> Iterator[Hook]:
    """Methods that others put in the place of modules' `forward`."""
    for path, module in modules:
        function = _replaced_forward(module)
        if function is not None:
            yield _hook(path, FORWARD, function)


def _hook(path: str, kind: str, function: Any) -> Hook:
    inner = next(inner for inner in _unwrapped(function) if _is_users(inner))
    name = getattr(inner, "__qualname__", type(inner).__qualname__)
    return Hook(path, kind, f"{_package(inner)}.{name}", id(function), function)


def is_foreign(function: Any) -> bool:
    """Whether a hook is a user's own, and no part of how a framework runs a model."""
    return any(map(_is_users, _unwrapped(function)))


def _unwrapped(function: Any) -> Iterator[Any]:
    """A function, and what it wraps: a user's may wrap a framework's, and the other way round."""
    while function is not None:
        if isinstance(function, functools.partial):
            function = function.func
            continue
        yield function
        function = getattr(function, "__wrapped__", None)


def _is_users(function: Any) -> bool:
    return _package(function).partition(".")[0] not in FRAMEWORKS


def _package(function: Any) -> str:
    """Where a function was written; `functools.wraps` makes `__module__` that of another."""
    function = getattr(function, "__func__", function)
    written = getattr(function, "__globals__", {}).get("__name__")
    return str(written or getattr(function, "__module__", None) or type(function).__module__)


def _replaced_forward(module: torch.nn.Module) -> Any:
    """A user's function in the place of a module's `forward`; None where it is the class's."""
    own = module.__dict__.get("forward")
    state = module.__dict__.get("__nnsight__")  # nnsight keeps the one that it wrapped
    if state is not None and type(own).__module__.startswith("nnsight"):
        own = state.original
    if own is None or own is type(module).forward:
        return None
    # nnsight wraps a replaced method once more.
    inner = own
    if getattr(own, "__module__", "").startswith("nnsight") and getattr(own, "__closure__", None):
        inner = own.__closure__[0].cell_contents
    own_method = getattr(inner, "__func__", inner) is type(module).forward
    return inner if is_foreign(inner) and not own_method else None


def _written_at(edit: Any) -> str:
    """File and line of an nnsight edit."""
    code = getattr(edit, "code", None)
    if code is None:
        return "of unknown origin"
    # nnsight compiles an edit by itself, with the first line numbered 0 or 1.
    lines = [line for _, _, line in code.co_lines() if line is not None and line > 1]
    return f"at {code.co_filename.rpartition('/')[2]}:{min(lines, default=1)}"


def _adapters(modules: list[tuple[str, torch.nn.Module]]) -> Iterator[tuple[Any, ...]]:
    tuners = sys.modules.get("peft.tuners.tuners_utils")
    if tuners is None:
        return
    for path, module in modules:
        if isinstance(module, tuners.BaseTunerLayer):
            scaling = getattr(module, "scaling", None)
            yield (
                path,
                tuple(module.active_adapters),
                tuple(getattr(module, "merged_adapters", ())),
                bool(module.disable_adapters),
                tuple(sorted(scaling.items())) if isinstance(scaling, dict) else (),
            )
