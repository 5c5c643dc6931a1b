"""What the tables of bad inputs have in common: how a case is judged."""

from __future__ import annotations

from typing import Any

import pytest

import twotower as tt

INPUT, MODEL, SCHEMA = tt.errors.InputError, tt.errors.ModelError, tt.errors.SchemaError
STORE, FETCH = tt.errors.StoreError, tt.errors.FetchError


def refused(case: tuple[Any, type[Exception], str], *given: Any) -> None:
    """A case (call, class, message) raises that very class, with one sentence in one line."""
    call, error, message = case
    with pytest.raises(error, match=message) as caught:
        call(*given)
    assert type(caught.value) is error
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1000
