"""Settings of the engine that computes the units, common to several commands."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from cyclopts import Parameter

from ..checks import whole
from ..errors import InputError
from .load_settings import MaybeWhole


@dataclass(frozen=True, kw_only=True)
class EngineSettings:
    """Settings of the engine that computes the units.

    Attributes
    ----------
    engine
        local: this process. ray: model replicas on a Ray cluster, started on this machine or
        joined.
    workers
        Number of replicas; by default as many as the GPUs allow. Without GPUs, one per
        `threads` CPUs, or one if `threads` is not set.
    gpus_per_replica
        GPUs per replica; by default 1 if there are GPUs.
    address
        A Ray cluster to join: auto (the one on this machine), or host:6379.
    patience
        Seconds to retry a failed write to the store.
    """

    engine: Literal["local", "ray"] = "local"
    workers: MaybeWhole = None
    gpus_per_replica: MaybeWhole = None
    address: str | None = None
    patience: float = 300.0

    def check(self) -> None:
        """Check the settings.

        Raises
        ------
        InputError
            With the wrong setting.
        """
        if self.workers is not None:
            whole("workers", self.workers, 1)
        if self.gpus_per_replica is not None:
            whole("gpus_per_replica", self.gpus_per_replica, 0)
        if not self.patience >= 0:
            raise InputError(f"patience={self.patience} must be at least 0")
        if self.engine == "local":
            for name in ("workers", "gpus_per_replica", "address"):
                if getattr(self, name) is not None:
                    option = name.replace("_", "-")
                    raise InputError(f"--{option} is for --engine ray")


HowRun = Annotated[EngineSettings | None, Parameter(name="*")]
"""The settings as options of a command."""
