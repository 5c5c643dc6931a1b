"""Findings of a measure's proof: the worst error and the allowed error of each identity."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Finding:
    """The worst case of an identity.

    Attributes
    ----------
    error, allowed
        Relative errors, as `twotower.models.rounding` defines them for each identity.
    """

    error: float
    allowed: float

    @property
    def strain(self) -> float:
        """Error divided by the allowed error; above 1 the identity does not hold."""
        if self.error == 0:
            return 0.0
        return self.error / self.allowed if self.allowed else math.inf


@dataclass
class Findings:
    """The proof of a measure, collected over its batches.

    Attributes
    ----------
    identities
        Worst case of each identity.
    prompts
        Number of prompts checked.
    second_forward
        Comparison of one number from two forward passes without shared code, in the same state
        of the model.
    made
        Whether the proof was made.
    unsteady
        Comparisons that did not hold because rounding may change a choice of experts.
    """

    identities: dict[str, Finding] = field(default_factory=dict)
    prompts: int = 0
    second_forward: dict[str, Any] = field(default_factory=dict)
    made: bool = True
    unsteady: set[str] = field(default_factory=set)

    def add(self, identity: str, finding: Finding) -> None:
        """Keep a finding if it is the worst so far."""
        known = self.identities.get(identity)
        if known is None or not finding.strain <= known.strain:
            self.identities[identity] = finding

    def describe(self) -> str:
        """Return the findings as JSON, for a dataset's attribute."""
        worst = {
            name: {"error": _short(one.error), "allowed": _short(one.allowed)}
            for name, one in self.identities.items()
        }
        about: dict[str, Any] = {"made": self.made, "prompts": self.prompts, "identities": worst}
        if self.second_forward:
            about["second_forward"] = self.second_forward
        if self.unsteady:
            about["unsteady"] = sorted(self.unsteady)
        return json.dumps(about)

    @classmethod
    def joined(cls, texts: list[str]) -> str:
        """Combine the proofs of several parts of a run, given as texts of `describe`."""
        whole = cls()
        for text in texts:
            part: Mapping[str, Any] = json.loads(text)
            whole.made &= part["made"]
            whole.prompts += part["prompts"]
            whole.second_forward = whole.second_forward or part.get("second_forward", {})
            whole.unsteady |= set(part.get("unsteady", []))
            for name, one in part["identities"].items():
                whole.add(name, Finding(one["error"], one["allowed"]))
        return whole.describe()


def _short(number: float) -> float:
    return float(f"{number:.3g}")
