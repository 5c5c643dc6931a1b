"""Decorator of all measures: checks, preparation, and one warning of missing values."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import wraps
from typing import TYPE_CHECKING, Any, TypeVar, cast

from ..checks import check_measured
from ..errors import CheckError, TwoTowerWarning
from ..models.measuring import measuring
from ..walk.not_finite import outside, warns_once

if TYPE_CHECKING:
    from ..models import Model
    from ..prompts import Prompts

F = TypeVar("F", bound=Callable[..., Any])


def measurement(function: F) -> F:
    """Check a function's model and prompts, prepare the model, and warn once of missing values.

    Measures may call each other; the outermost one collects their proofs and warnings.

    If a proof fails while the cache holds values derived from the weights by an earlier
    measure, the cache is emptied and the function runs once more. A few weights may have
    changed without a visible change of the model's state.
    """

    @wraps(function)
    def run(model: Model, prompts: Prompts, *arguments: Any, **options: Any) -> Any:
        check_measured(model, prompts)
        with measuring(model) as outermost:
            derived = outermost and bool(model.cache)
            try:
                found = function(model, prompts, *arguments, **options)
            except CheckError:
                if not derived:
                    raise
                model.forget()
                found = function(model, prompts, *arguments, **options)
            if outermost and model.proof.unsteady:
                _tell_unsteady(model)
            return found

    return cast(F, warns_once(run))


def _tell_unsteady(model: Model) -> None:
    """Warn that rounding changed choices of experts, so that small effects are not certain."""
    errors = {name: one.error for name, one in model.proof.identities.items()}
    errors["second forward"] = model.proof.second_forward.get("error", 0.0)
    names = sorted(model.proof.unsteady)
    sizes = ", ".join(f"{errors[name]:.2g}" for name in names)
    warnings.warn(
        f"{model.name}: in {str(model.dtype).removeprefix('torch.')}, rounding changes which "
        "experts some tokens get, so the same token computed beside others has other values "
        f"(relative errors up to {sizes}; attribute proof, unsteady: {', '.join(names)}). Small "
        "effects are not certain; in float32 they are",
        TwoTowerWarning,
        stacklevel=outside(),
    )
