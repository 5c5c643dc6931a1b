"""Making a function of model and prompts a measure."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import TYPE_CHECKING, Any, TypeVar, cast

from ..checks import check_measured
from ..models.measuring import measuring
from .missing import tells_once

if TYPE_CHECKING:
    from ..models import Model
    from ..prompts import Prompts

F = TypeVar("F", bound=Callable[..., Any])


def measure(function: F) -> F:
    """Check arguments, prepare the model, and tell once what is not finite.

    Measures may call each other: their proofs and notices are gathered into the outermost's.
    """

    @wraps(function)
    def run(model: Model, prompts: Prompts, *arguments: Any, **options: Any) -> Any:
        check_measured(model, prompts)
        with measuring(model):
            return function(model, prompts, *arguments, **options)

    return cast(F, tells_once(run))
