"""What a head's output becomes: five data classes, used by sweeps and edits alike."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, get_args

from ..checks import check_is, finite, whole
from ..errors import InputError

if TYPE_CHECKING:
    from ..prompts import Prompts


@dataclass(frozen=True)
class Zero:
    """The head's output z, before the output projection, becomes zero.

    Notes
    -----
    At all positions this equals zeroing the head's columns of the output projection, which
    is how Yu & Ananiadou (2024) intervene.
    """

    def describe(self) -> dict[str, Any]:
        """Return the change as attributes of a dataset."""
        return {"to": "zero"}


@dataclass(frozen=True, eq=False)
class Mean:
    """The head's output becomes its mean over reference prompts (mean ablation).

    The mean is taken by layer, head, role and number of demonstration. It is computed once,
    before any batching.

    Parameters
    ----------
    reference
        Prompts to average over.
    """

    reference: Prompts

    def __post_init__(self) -> None:
        check_is(self.reference, "Prompts", "reference")

    def describe(self) -> dict[str, Any]:
        """Return the change as attributes of a dataset."""
        return {"to": "mean", "reference": self.reference.hash}


@dataclass(frozen=True, eq=False)
class Resample:
    """The head's output becomes that of a random reference prompt (resample ablation).

    Every prompt gets one donor that differs from it, and positions are matched by role and
    number of demonstration.

    Parameters
    ----------
    reference
        Prompts to draw from.
    seed
        Seed of the draw.
    """

    reference: Prompts
    seed: int = 0

    def __post_init__(self) -> None:
        check_is(self.reference, "Prompts", "reference")
        whole("seed", self.seed)

    def describe(self) -> dict[str, Any]:
        """Return the change as attributes of a dataset."""
        return {"to": "resample", "reference": self.reference.hash, "seed": int(self.seed)}


@dataclass(frozen=True, eq=False)
class From:
    """The head's output becomes that of the prompt's donor (activation patching).

    Parameters
    ----------
    donor
        One donor for each prompt, aligned to it by role and number of demonstration, such
        as `prompts.reversed_labels()`.
    """

    donor: Prompts

    def __post_init__(self) -> None:
        check_is(self.donor, "Prompts", "donor")

    def describe(self) -> dict[str, Any]:
        """Return the change as attributes of a dataset."""
        return {"to": "from", "donor": self.donor.hash}


@dataclass(frozen=True)
class Times:
    """The head's output is multiplied by a factor.

    Parameters
    ----------
    factor
        1 changes nothing; 0 equals `Zero`.
    """

    factor: float

    def __post_init__(self) -> None:
        finite("factor", self.factor)

    def describe(self) -> dict[str, Any]:
        """Return the change as attributes of a dataset."""
        return {"to": "times", "factor": float(self.factor)}


Change = Zero | Mean | Resample | From | Times


def check_change(to: Any) -> None:
    """Reject anything but a change.

    Raises
    ------
    InputError
        With the changes that exist.
    """
    if isinstance(to, get_args(Change)):
        return
    names = ", ".join(f"tt.{kind.__name__}" for kind in get_args(Change))
    raise InputError(f"to={to!r} is not a change of a head's output; use one of {names}")
