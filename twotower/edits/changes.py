"""Changes of a head's output: data classes that sweeps and edits share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, get_args

from ..checks import check_is, finite, shown, whole
from ..errors import InputError

if TYPE_CHECKING:
    from ..prompts import Prompts


@dataclass(frozen=True)
class Zero:
    """Set the head's output z (before the output projection) to zero.

    Notes
    -----
    At all positions, this equals zeroing the head's columns of the output projection, as Yu &
    Ananiadou (2024) do.
    """

    def describe(self) -> dict[str, Any]:
        """Return the change as attributes of a dataset."""
        return {"to": "zero"}


@dataclass(frozen=True, eq=False)
class Mean:
    """Replace the head's output by its mean over reference prompts (mean ablation).

    There is one mean for each layer, head, role and number of demonstration. It is computed
    once, over all reference prompts. Where further tokens of an answer are predicted, it is the
    mean of the reference prompts' last positions.

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
    """Replace the head's output by that of a random reference prompt (resample ablation).

    Every prompt gets one donor that differs from it. Positions are matched by role and number
    of demonstration. An answer of several tokens, or a completion, follows the donor as it
    follows the prompt.

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
    """Replace the head's output by that of the prompt's donor (activation patching).

    Parameters
    ----------
    donor
        One donor for each prompt, aligned to it by role and number of demonstration, such
        as `prompts.reversed_labels()`. An answer of several tokens, or a completion, follows
        the donor as it follows the prompt.
    """

    donor: Prompts

    def __post_init__(self) -> None:
        check_is(self.donor, "Prompts", "donor")

    def describe(self) -> dict[str, Any]:
        """Return the change as attributes of a dataset."""
        return {"to": "from", "donor": self.donor.hash}


@dataclass(frozen=True)
class Times:
    """Multiply the head's output by a factor.

    Parameters
    ----------
    factor
        1 changes nothing; 0 equals `Zero`.
    """

    factor: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "factor", finite("factor", self.factor))

    def describe(self) -> dict[str, Any]:
        """Return the change as attributes of a dataset."""
        return {"to": "times", "factor": float(self.factor)}


Change = Zero | Mean | Resample | From | Times


def check_change(to: Any) -> None:
    """Check that a value is a change of a head's output.

    Raises
    ------
    InputError
        If it is not; the message lists the changes.
    """
    if isinstance(to, get_args(Change)):
        return
    names = ", ".join(f"tt.{kind.__name__}" for kind in get_args(Change))
    raise InputError(f"to={shown(to)} is not a change of a head's output; use one of {names}")
