"""How many examples: few in the usual tests, many where TWOTOWER_EXAMPLES asks for them."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

N = int(os.environ.get("TWOTOWER_EXAMPLES", "0"))


def examples(few: int) -> settings:
    """Settings of a property; the same examples every time unless many are asked for."""
    return settings(
        max_examples=N or few,
        deadline=None,
        derandomize=not N,
        database=None,
        suppress_health_check=[
            HealthCheck.too_slow,
            HealthCheck.function_scoped_fixture,
            HealthCheck.data_too_large,
        ],
    )
