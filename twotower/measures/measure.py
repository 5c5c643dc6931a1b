"""Making a function of model and prompts a measure."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import TYPE_CHECKING, Any, TypeVar, cast

from ..checks import check_measured
from ..errors import CheckError
from ..models.measuring import measuring
from .missing import tells_once

if TYPE_CHECKING:
    from ..models import Model
    from ..prompts import Prompts

F = TypeVar("F", bound=Callable[..., Any])


def measure(function: F) -> F:
    """Check arguments, prepare the model, and tell once what is not finite.

    Measures may call each other: their proofs and notices are gathered into the outermost's.

    Where a proof fails that uses what was derived from the weights in an earlier measure, that is
    derived anew, and the measure is made once more: a few elements may have been changed in a way
    that the state of the model does not show.
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
