"""Current state of a model: everything that determines its numbers.

Users train a model, load other weights, add hooks or adapters, or cast it. Each measure takes the
state first. If the state differs from that of the previous measure, cached values are discarded
and the model is checked again.

Taking the state must be cheap, so weights are not read completely. A weight is identified by its
tensor, by autograd's version counter of in-place changes, and by a sample of its elements. The
sample detects changes through `weight.data`, which the version misses. If only a few elements
change through `.data`, all three may miss it; the check of the batch must then detect it.
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
"""Number of sampled elements per weight, evenly spaced."""

FRAMEWORKS = (
    "accelerate",
    "bitsandbytes",
    "nnsight",
    "peft",
    "torch",
    "transformers",
    "twotower",
)
"""Packages whose hooks belong to running a model, such as hooks that move weights."""

HOOKS = {
    "_forward_hooks": "forward hook",
    "_forward_pre_hooks": "forward pre-hook",
    "_backward_hooks": "backward hook",
    "_backward_pre_hooks": "backward pre-hook",
}
"""Attributes where torch keeps a module's hooks, and the kinds of hook."""

PLAIN = (bool, int, float, str)
"""Types of modules' attributes that belong to the state."""

FORWARD = "forward"
"""Kind of a replaced `forward` method."""


@dataclass(frozen=True)
class Hook:
    """A user's hook on a module.

    Attributes
    ----------
    path
        Path of the module; "every module" for torch's global hooks.
    kind
        "forward hook", "forward pre-hook", or "forward" where the method itself was replaced.
    name
        Name of the function, with its Python module.
    identity
        `id` of the function object.
    function
        The function, kept alive so that no other object gets its `id`.
    """

    path: str
    kind: str
    name: str
    identity: int
    function: Any = field(compare=False, repr=False)

    @property
    def is_before(self) -> bool:
        """Whether the hook gets the module's input, not its output."""
        return self.kind == HOOKS["_forward_pre_hooks"]

    def __str__(self) -> str:
        return f"{self.kind} {self.name} on {self.path or 'the model'}"


@dataclass(frozen=True)
class State:
    """Everything that determines a model's numbers.

    Attributes
    ----------
    identity
        Hash of the identities of all modules, edits, weights and buffers, of the versions of
        weights and buffers, and of sampled elements of buffers that are not saved.
    sample
        Hash of sampled elements of what is saved; the same for the same weights in every process.
    hooks
        User hooks.
    edits
        Active nnsight edits, by source file and line.
    adapters
        For each adapted module: active, merged and disabled adapters, and their scales.
    kernel
        Attention implementation.
    functions
        Hash of the identities of functions that modules call: those of torch.nn.functional, those
        beside the modules' classes, and the attention kernels.
    settings
        Hash of the configuration, and of the modules' own numbers, such as epsilons and scales.
    dtypes
        Dtypes of the weights and buffers, most frequent first.
    held
        The edits, kept alive so that no other objects get their `id`.
    """

    identity: str
    sample: str
    hooks: tuple[Hook, ...]
    edits: tuple[str, ...]
    adapters: tuple[Any, ...]
    kernel: str | None
    functions: str
    settings: str
    dtypes: tuple[str, ...]
    held: tuple[Any, ...] = field(default=(), compare=False, repr=False)

    def differences(self, other: State) -> list[str]:
        """Return the names of the parts that differ between two states."""
        parts = {"weights": "sample", "attention kernel": "kernel", "configuration": "settings"}
        parts |= {name: name for name in ("hooks", "edits", "adapters", "functions", "dtypes")}
        return [name for name, at in parts.items() if getattr(self, at) != getattr(other, at)]

    def unfollowed(self) -> list[str]:
        """Return descriptions of the user interventions that a sweep's rows can never include.

        These are nnsight edits, which act only in traces, and replaced `forward` methods, which
        may count positions that differ in rows.
        """
        found = [str(hook) for hook in self.hooks if hook.kind == FORWARD]
        return found + [f"nnsight edit {edit}" for edit in self.edits]

    def interventions(self) -> list[str]:
        """Return descriptions of all user interventions."""
        found = [str(hook) for hook in self.hooks]
        return found + [f"nnsight edit {edit}" for edit in self.edits]


def take_state(model: Model) -> State:
    """Return the current state of a model.

    For a remote model only the edits are known.
    """
    root = model.module
    modules = list(root.named_modules(remove_duplicate=True))
    saved, passing = ([], []) if model.remote else _tensors_in(modules)
    tensors = [*saved, *passing]
    edits = getattr(model.traced, "_edits", ())
    own = [(id(module), id(type(module).forward)) for _, module in modules]
    return State(
        _hash([*map(_identity, tensors), *map(id, edits), *own, _sample(passing)]),
        _sample(saved),
        (*(hook for _, _, hook in hooks_of(modules)), *_replaced(modules)),
        tuple(map(_written_at, edits)),
        tuple(_adapters(modules)),
        model.attention_kernel,
        _functions(modules),
        _settings(root, modules),
        _dtypes(tensors),
        tuple(edits),
    )


def saved_of(root: torch.nn.Module) -> list[torch.Tensor]:
    """Return a model's weights and the buffers that are saved with them.

    Others, such as rotary frequencies, may follow from the last prompt.
    """
    return _tensors_in(list(root.named_modules(remove_duplicate=True)))[0]


def _tensors_in(
    modules: list[tuple[str, torch.nn.Module]],
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Return weights and saved buffers, and the buffers that are not saved."""
    saved: list[torch.Tensor] = []
    passing: list[torch.Tensor] = []
    for _, module in modules:
        for name, tensor in itertools.chain(module._parameters.items(), module._buffers.items()):
            if tensor is not None:
                here = passing if name in module._non_persistent_buffers_set else saved
                here.append(tensor)
    return saved, passing


def _identity(tensor: torch.Tensor) -> tuple[Any, ...]:
    form = (tensor.dtype, tensor.shape, tensor.device)
    if tensor.is_meta:  # offloaded: a new tensor after each forward pass
        return form
    version = -1 if tensor.is_inference() else tensor._version
    place = tensor.data_ptr() if tensor.layout == torch.strided else 0
    return id(tensor), version, place, *form


def _hash(values: Any) -> str:
    return hashlib.blake2b(repr(tuple(values)).encode(), digest_size=16).hexdigest()


def _sample(tensors: list[torch.Tensor]) -> str:
    """Return a hash of sampled elements of every tensor; one copy per device and dtype."""
    found = hashlib.blake2b(digest_size=16)
    groups: dict[tuple[torch.device, torch.dtype], list[torch.Tensor]] = {}
    for tensor in tensors:
        # Offloaded weights are on "meta" until needed.
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
    """Return elements spread evenly over a tensor's memory."""
    if tensor.layout != torch.strided:
        tensor = tensor.to_dense()
    span = tensor.numel()
    if not tensor.is_contiguous():
        steps = zip(tensor.shape, tensor.stride(), strict=True)
        span = 1 + sum((n - 1) * step for n, step in steps)
    n = min(SAMPLES, span)
    return tensor.as_strided((n,), (max(1, (span - 1) // max(1, n - 1)),))


def _functions(modules: list[tuple[str, torch.nn.Module]]) -> str:
    """Return a hash of the identities of the functions that modules call."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    places = {type(module).__module__ for _, module in modules} | {"torch.nn.functional"}
    places.discard("__main__")  # what else a script defines
    found = []
    for place in sorted(places):
        names = vars(sys.modules[place]) if place in sys.modules else {}
        found += [(place, name, id(value)) for name, value in names.items() if callable(value)]
    kernels = ALL_ATTENTION_FUNCTIONS.valid_keys()
    return _hash([*found, *((name, id(ALL_ATTENTION_FUNCTIONS[name])) for name in kernels)])


def _settings(root: Any, modules: list[tuple[str, torch.nn.Module]]) -> str:
    """Return a hash of the configuration and of the modules' own numbers and texts."""
    own = [
        (path, name, value)
        for path, module in modules
        for name, value in module.__dict__.items()
        if type(value) in PLAIN and name != "training" and name[0] != "_" and "cached" not in name
    ]
    config: Any = getattr(root, "config", None)
    return _hash([config.to_dict() if hasattr(config, "to_dict") else config, own])


def _dtypes(tensors: list[torch.Tensor]) -> tuple[str, ...]:
    counts: dict[str, int] = {}
    for tensor in tensors:
        name = str(tensor.dtype).removeprefix("torch.")
        counts[name] = counts.get(name, 0) + tensor.numel()
    return tuple(sorted(counts, key=lambda name: -counts[name]))


def hooks_of(
    modules: list[tuple[str, torch.nn.Module]],
) -> Iterator[tuple[dict[int, Any], int, Hook]]:
    """Iterate over user hooks, global ones included, each with its dict and key in torch."""
    for where, kind in HOOKS.items():
        places = [("every module", getattr(torch_modules, f"_global{where}"))]
        places += [(path, getattr(module, where)) for path, module in modules]
        for path, hooks in places:
            for key, function in list(hooks.items()):
                if is_foreign(function):
                    yield hooks, key, _hook(path, kind, function)


def _replaced(modules: list[tuple[str, torch.nn.Module]]) -> Iterator[Hook]:
    """Iterate over user functions that replace a module's `forward`."""
    for path, module in modules:
        function = _replaced_forward(module)
        if function is not None:
            yield _hook(path, FORWARD, function)


def _hook(path: str, kind: str, function: Any) -> Hook:
    inner = next(inner for inner in _unwrapped(function) if _is_users(inner))
    name = getattr(inner, "__qualname__", type(inner).__qualname__)
    return Hook(path, kind, f"{_package(inner)}.{name}", id(function), function)


def is_foreign(function: Any) -> bool:
    """Check that a hook is the user's, not a framework's."""
    return any(map(_is_users, _unwrapped(function)))


def _unwrapped(function: Any) -> Iterator[Any]:
    """Iterate over a function and the functions it wraps, of the user or of a framework."""
    while function is not None:
        if isinstance(function, functools.partial):
            function = function.func
            continue
        yield function
        function = getattr(function, "__wrapped__", None)


def _is_users(function: Any) -> bool:
    return _package(function).partition(".")[0] not in FRAMEWORKS


def _package(function: Any) -> str:
    """Return the Python module of a function; `functools.wraps` overwrites `__module__`."""
    function = getattr(function, "__func__", function)
    written = getattr(function, "__globals__", {}).get("__name__")
    return str(written or getattr(function, "__module__", None) or type(function).__module__)


def _replaced_forward(module: torch.nn.Module) -> Any:
    """Return a user's function that replaces a module's `forward`, or None."""
    own = module.__dict__.get("forward")
    state = module.__dict__.get("__nnsight__")  # nnsight keeps the wrapped method
    if state is not None and type(own).__module__.startswith("nnsight"):
        own = state.original
    if own is None or own is type(module).forward:
        return None
    # nnsight wraps a replaced method again.
    inner = own
    if getattr(own, "__module__", "").startswith("nnsight") and getattr(own, "__closure__", None):
        inner = own.__closure__[0].cell_contents
    own_method = getattr(inner, "__func__", inner) is type(module).forward
    return inner if is_foreign(inner) and not own_method else None


def _written_at(edit: Any) -> str:
    """Return file and line of an nnsight edit."""
    code = getattr(edit, "code", None)
    if code is None:
        return "of unknown origin"
    # nnsight compiles an edit separately; its first line has number 0 or 1.
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
