"""Decorator of all measures: checks, preparation, and one warning of missing values."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import TYPE_CHECKING, Any, TypeVar, cast

from ..checks import check_measured
from ..errors import CheckError
from ..models.measuring import measuring
from ..walk.not_finite import warns_once

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
                return function(model, prompts, *arguments, **options)
            except CheckError:
                if not derived:
                    raise
            model.forget()
            return function(model, prompts, *arguments, **options)

    return cast(F, warns_once(run))
