"""What is said of a model that the hub does not give."""

from __future__ import annotations

import httpx
import pytest
from huggingface_hub.errors import (
    GatedRepoError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from twotower.errors import ModelError
from twotower.models.load_errors import readable

ANSWER = httpx.Response(404, request=httpx.Request("GET", "https://hub.example/some/model"))


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (GatedRepoError, "'some/model' is gated: request access on its page, and log in"),
        (RevisionNotFoundError, "'some/model' has no revision 'v2' on the hub"),
        (RepositoryNotFoundError, "there is no 'some/model' on the hub, or it is private"),
    ],
)
@pytest.mark.parametrize("wrapped", [False, True])
def test_what_the_hub_answered(kind: type[Exception], words: str, wrapped: bool) -> None:
    error = kind("404 Client Error", response=ANSWER)
    if wrapped:  # as transformers raises it
        outer = OSError("some/model is not a local folder")
        outer.__cause__, error = error, outer
    found = readable("some/model", error, "v2")
    assert type(found) is ModelError
    assert str(found).startswith(words)


def test_no_answer() -> None:
    found = str(readable("some/model", OSError("no network"), "v2"))
    assert found.startswith("'some/model (revision v2)' is not a folder, and")
    assert "no network" in found
    assert "Check the name and the network" in found


def test_anything_else() -> None:
    assert str(readable("some/model", ZeroDivisionError("by 0"), None)) == (
        "some/model could not be loaded: ZeroDivisionError: by 0"
    )
