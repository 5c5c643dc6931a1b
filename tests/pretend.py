"""Devices that are pretended: real numbers on the processor, and an error where they would meet.

A tensor on device "pretend:2" holds an ordinary tensor. What is computed from it is computed on
the processor, but only with tensors of the same device, as on GPUs; so a model that is spread
over several such devices gives its true results, and every operation across devices is seen,
values that a GPU would take from the host among them. Needs no GPU and no other build of torch.
"""

from __future__ import annotations

import re
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest
import torch
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

aten = torch.ops.aten
NAME = "pretend"
_setup_privateuseone_for_python_backend(NAME)  # once a process; gives the name to torch

INDEXED = (aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_)


class CrossDeviceError(Exception):
    """Tensors of several devices met in an operation."""


class Placed(torch.Tensor):
    """A tensor that says it is elsewhere; to torch's own code it is on the processor."""

    held: torch.Tensor
    place: torch.device

    @staticmethod
    def __new__(cls, held: torch.Tensor, place: torch.device) -> Placed:
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device="cpu",
        )
        made.held, made.place = held, place
        return made

    @property
    def device(self) -> torch.device:
        return self.place

    def to(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        # torch would compare with the processor, where it believes the tensors to be.
        if args and tensor(args[0]):
            args = (args[0].device, args[0].dtype)
        device, dtype, _, _ = torch._C._nn._parse_to(*args, **kwargs)
        device, dtype = device or self.place, dtype or self.dtype
        if (device, dtype) == (self.place, self.dtype):
            return self
        if torch.is_grad_enabled() and self.requires_grad:
            return _Move.apply(self, dtype, device)
        return aten._to_copy.default(self, dtype=dtype, device=device)

    def cpu(self) -> torch.Tensor:
        return self.to("cpu")

    def __repr__(self) -> str:
        return f"Placed({self.held}, {self.place})"

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        what, given = func.overloadpacket, [x for x in tree_leaves((args, kwargs)) if tensor(x)]
        home = max((x.device for x in given if isinstance(x, Placed)), key=lambda x: x.index)
        moved = what in (aten._to_copy, aten.copy_)
        if kwargs.get("device") is not None:
            # Else "cpu" is from torch's own code, which believes the tensors to be there.
            if moved or torch.device(kwargs["device"]).type == NAME:
                home = torch.device(kwargs["device"])
            kwargs = {**kwargs, "device": torch.device("cpu")}
        # A number is a tensor of no dims, and may come from anywhere; so may a list as an index.
        met = given[:1] if what in INDEXED else given
        devices = {x.device for x in met if x.dim()}
        devices |= {x.device for x in given if isinstance(x, Placed) and x.dim()}
        if len(devices) > 1 and not moved:
            raise CrossDeviceError(f"{func} between {sorted(map(str, devices))}")
        if moved and home.type == NAME and {x.device for x in given} != {home}:
            _note(given[-1] if what is aten.copy_ else given[0], home)
        held = tree_map(lambda x: x.held if isinstance(x, Placed) else x, (args, kwargs))
        found = func(*held[0], **held[1])
        if home.type != NAME:
            return found
        found = tree_map(lambda x: Placed(x, home) if tensor(x) else x, found)
        return return_and_correct_aliasing(func, args, kwargs, found)


def tensor(x: Any) -> bool:
    return isinstance(x, torch.Tensor)


class _Move(torch.autograd.Function):
    """Gradients go back to where a tensor was, which torch's own code does not know."""

    @staticmethod
    def forward(ctx: Any, x: Placed, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        ctx.came_from = x.dtype, x.device
        return aten._to_copy.default(x, dtype=dtype, device=device)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        dtype, device = ctx.came_from
        return gradient.to(device, dtype), None, None


# ---- what torch asks of a device ----------------------------------------------------------


def _factory(make: Callable[..., torch.Tensor]) -> Callable[..., Placed]:
    def placed(*args: Any, device: Any = None, pin_memory: Any = None, **options: Any) -> Placed:
        options.pop("layout", None)
        return Placed(make(*args, **options), torch.device(device))

    return placed


def _from_host(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def made(*args: Any, device: Any = None, **options: Any) -> torch.Tensor:
        found = make(*args, **options)
        return found if device is None else found.to(device)

    return made


_LIBRARY = torch.library.Library("aten", "IMPL")
_MADE = ("arange", "arange.start", "arange.start_step", "eye", "eye.m", "empty_strided")
for _name in (*_MADE, "empty.memory_format"):
    _base, _, _overload = _name.partition(".")
    _made = getattr(getattr(aten, _base), _overload or "default")
    _LIBRARY.impl(_name, _factory(_made), "PrivateUse1")


@contextmanager
def devices() -> Iterator[None]:
    """While tensors are placed: there is nothing to wait for, and lists and arrays are copied."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.accelerator, "synchronize", lambda device=None: None)
        for name in ("tensor", "as_tensor"):
            patch.setattr(torch, name, _from_host(getattr(torch, name)))
        yield


# ---- what came from where -----------------------------------------------------------------


class Transfer(NamedTuple):
    """What was copied to a pretended device."""

    shape: tuple[int, ...]
    source: torch.device
    to: torch.device
    line: str


_transfers: list[Transfer] | None = None


def _note(source: torch.Tensor, to: torch.device) -> None:
    if _transfers is None:
        return
    frames = traceback.extract_stack()
    by = next(x for x in reversed(frames) if not re.search(r"/torch/|pretend\.py$", x.filename))
    if re.search(r"twotower/\w+/\w+\.py$", by.filename):  # not transformers or accelerate
        at = f"{by.filename.rpartition('/')[2]}:{by.lineno}"
        _transfers.append(Transfer(tuple(source.shape), source.device, to, at))


@contextmanager
def transfers() -> Iterator[list[Transfer]]:
    """What the package itself copies to pretended devices, accelerate's own copies left out."""
    global _transfers
    _transfers = []
    try:
        yield _transfers
    finally:
        _transfers = None


# ---- models on them -----------------------------------------------------------------------


def spread_out(module: Any, n: int) -> Any:
    """A transformers model over n devices, as accelerate does it; layers in equal parts.

    With more devices than layers the embedding and what follows the layers have their own.
    """
    from accelerate import dispatch_model

    (path,) = (
        name
        for name, child in module.named_modules()
        if isinstance(child, torch.nn.ModuleList) and name.count(".") == 1
    )
    owner, _, layers = path.partition(".")
    n_layers, first = len(getattr(getattr(module, owner), layers)), 1
    between = n - 2 if n > n_layers else n
    device_map = {}
    for name, _ in getattr(module, owner).named_children():
        device_map[f"{owner}.{name}"] = first
        first = n if name == layers else first
    del device_map[path]
    for i in range(n_layers):
        device_map[f"{path}.{i}"] = 1 + (n > n_layers) + i * between // n_layers
    tied = module.config.tie_word_embeddings  # then where the embedding is
    device_map |= {name: 1 if tied else n for name, _ in module.named_children() if name != owner}
    device_map = {name: f"{NAME}:{number}" for name, number in device_map.items()}
    return dispatch_model(module, device_map, main_device=f"{NAME}:1", force_hooks=True)
