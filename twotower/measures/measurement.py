"""What every call of a measure does first and last: checks, preparation, one warning."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import TYPE_CHECKING, Any, TypeVar, cast

from ..checks import check_measured
from ..errors import CheckError
from ..models.measuring import measuring
from ..walk.not_finite import tells_once

if TYPE_CHECKING:
    from ..models import Model
    from ..prompts import Prompts

F = TypeVar("F", bound=Callable[..., Any])


def measurement(function: F) -> F:
    """Check a function's model and prompts, prepare the model, and warn once of missing values.

    Measures may call each other: the outermost one gathers their proofs and warnings.

    If a proof fails that uses what an earlier measure derived from the weights, the cache is
    emptied and the function runs once more: a few weights may have changed in a way that the
    model's state does not show.
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

    return cast(F, tells_once(run))
