"""Translate loading errors into one sentence that says what to do."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from ..errors import InputError, ModelError


def readable(name: str, error: Exception, revision: str | None = None) -> Exception:
    """Translate an error of transformers or the hub into an error of this package.

    Parameters
    ----------
    name
        Hub id or folder of the model or the tokenizer.
    error
        The error raised.
    revision
        The revision requested.
    """
    if isinstance(error, (ModelError, InputError)):
        return error
    reason = " ".join(str(error).split())
    if "trust_remote_code" in reason:
        return ModelError(
            f"{name} needs its own Python code, which is not run by default; if you trust it, "
            "pass trust_remote_code=True to twotower.load"
        )
    if "Weights only load failed" in reason:  # torch would advise running the pickle
        return ModelError(
            f"a file of {name} is damaged, or holds pickled Python objects beside weights, which "
            "are not loaded by default; copy or download it again, use safetensors, or, if you "
            "trust it, allow their classes with torch.serialization.safe_globals"
        )
    if _damaged(error, reason):
        return ModelError(
            f"a file of {name} is damaged ({reason[:200]}); copy or download it again"
        )
    if Path(name).is_dir():
        return ModelError(_of_a_folder(name, error, reason))
    return ModelError(_of_the_hub(name, error, reason, revision))


def _damaged(error: Exception, reason: str) -> bool:
    """Check whether the error means a corrupt file, in a folder or in the hub's cache."""
    from safetensors import SafetensorError

    words = "Error while deserializing", "unpickling", "Unpickling", "PytorchStreamReader"
    known = isinstance(error, (SafetensorError, json.JSONDecodeError))
    return known or any(word in reason for word in words)


def _of_a_folder(name: str, error: Exception, reason: str) -> str:
    folder = Path(name)
    if not (folder / "config.json").is_file():
        return f"the folder {name} holds no model: it has no config.json"
    if not any(folder.glob("*token*")) and "tokenizer" in reason:
        return f"the folder {name} holds no tokenizer; pass tokenizer="
    if isinstance(error, OSError):
        return f"the folder {name} holds no complete model: {reason}"
    return f"{name} could not be loaded: {type(error).__name__}: {reason[:500]}"


def _of_the_hub(name: str, error: Exception, reason: str, revision: str | None) -> str:
    from huggingface_hub.errors import (
        GatedRepoError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    causes = list(_causes(error))

    def says(kind: type[Exception]) -> bool:
        return any(isinstance(cause, kind) for cause in causes)

    if says(GatedRepoError):
        return (
            f"{name!r} is gated: request access on its page, and log in with `hf auth login`, or "
            "pass token="
        )
    if says(RevisionNotFoundError):
        return f"{name!r} has no revision {revision!r} on the hub"
    if says(RepositoryNotFoundError):
        return (
            f"there is no {name!r} on the hub, or it is private: check its spelling; for a private "
            "one log in with `hf auth login`, or pass token="
        )
    if isinstance(error, OSError):
        asked = name if revision is None else f"{name} (revision {revision})"
        return (
            f"{asked!r} is not a folder, and could not be loaded from the hub: {reason[:300]} "
            "Check the name and the network, or download the model and pass its folder"
        )
    return f"{name} could not be loaded: {type(error).__name__}: {reason[:500]}"


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """Iterate over an error and its causes."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
