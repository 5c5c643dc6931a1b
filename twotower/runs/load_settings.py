"""Settings for loading a model, common to several commands."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter

from ..checks import whole
from ..errors import InputError

if TYPE_CHECKING:
    from ..models import Model


def to_whole(kind: Any, tokens: Sequence[Any]) -> int:
    """Parse a whole number from the command line."""
    try:
        return int(tokens[0].value)
    except ValueError:
        raise InputError(f"{tokens[0].value!r} must be a whole number") from None


def to_wholes(kind: Any, tokens: Sequence[Any]) -> list[int]:
    """Parse several whole numbers from the command line."""
    return [to_whole(kind, [token]) for token in tokens]


Wholes = Parameter(consume_multiple=True, converter=to_wholes)
Whole = Annotated[int, Parameter(converter=to_whole)]
MaybeWhole = Annotated[int | None, Parameter(converter=to_whole)]


@dataclass(frozen=True, kw_only=True)
class LoadSettings:
    """Settings for loading a model.

    Attributes
    ----------
    dtype
        float32, bfloat16 or float16; by default the checkpoint's.
    device_map
        Placement of the model: auto, balanced, cuda:0, cpu.
    quantization
        int8 or nf4.
    revision
        Branch, tag or commit on the hub.
    remote
        Server that holds the model, so that no weights are loaded here: ndif, or the
        address of your own, such as http://host:6001.
    threads
        CPU threads; by default torch's choice.
    """

    dtype: str | None = None
    device_map: str | None = None
    quantization: Literal["int8", "nf4"] | None = None
    revision: str | None = None
    remote: str | None = None
    threads: MaybeWhole = None

    def options(self) -> dict[str, Any]:
        """Return the arguments for `twotower.load` that distinguish loaded models."""
        names = ("dtype", "device_map", "quantization", "revision")
        return {name: getattr(self, name) for name in names}

    def load(self, model: str, **more: Any) -> Model:
        """Load a model by hub id, folder or shape; `more` goes to `twotower.load`."""
        import torch

        from ..models import load

        if self.threads is not None:
            whole("threads", self.threads, 1)
            torch.set_num_threads(self.threads)
        if self.remote is not None:
            more["remote"] = True if self.remote == "ndif" else self.remote
        return load(model, **self.options(), **more)


How = Annotated[LoadSettings | None, Parameter(name="*")]
"""The settings as options of a command."""
