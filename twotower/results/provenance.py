"""Provenance of results, as attributes of every dataset."""

from __future__ import annotations

import hashlib
import json
import subprocess
from datetime import UTC, datetime
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

PACKAGES = ("twotower", "nnsight", "torch", "transformers", "accelerate", "bitsandbytes", "xarray")


def provenance(model: Any, prompts: Any, **settings: Any) -> dict[str, Any]:
    """Return the provenance attributes of a dataset.

    Parameters
    ----------
    model
        A `twotower.Model`.
    prompts
        `twotower.Prompts`.
    **settings
        Arguments of the measure, written as JSON.

    Returns
    -------
    dict
        Only strings and numbers, which every store supports.
    """
    return {
        "model": model.name,
        "model_revision": model.revision or "",
        "dtype": str(model.dtype).removeprefix("torch."),
        "quantization": model.quantization or "none",
        "device_map": json.dumps(model.device_map),
        "attention_kernel": model.attention_kernel or "",
        **model.about(),
        "tokenizer_hash": tokenizer_hash(model.tokenizer),
        "task": prompts.task_name,
        "labels": json.dumps(prompts.labels, ensure_ascii=False),
        **({"answers": "by prompt"} if prompts.answers.by_prompt else {}),
        **({"scoring": prompts.answers.scoring} if prompts.answers.token_id.shape[2] > 1 else {}),
        "prompts_hash": prompts.hash,
        "prompts": json.dumps(prompts.recipe.describe() if prompts.recipe else {}),
        "seed": -1 if prompts.seed is None else prompts.seed,
        "settings": json.dumps(settings, default=str, sort_keys=True),
        "versions": json.dumps(versions()),
        "git_commit": _git_commit(),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }


class _Remembered(WeakKeyDictionary[Any, tuple[Any, str]]):
    """Hashes by tokenizer, left behind where the functions that use them go to a server."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (type(self), ())


_hashes = _Remembered()


def tokenizer_hash(tokenizer: Any) -> str:
    """Return the SHA-256 of everything that determines a tokenizer's tokens.

    Truncation and padding are excluded, because calls of the tokenizer change them.

    Parameters
    ----------
    tokenizer
        A fast transformers tokenizer.

    Returns
    -------
    str
        Cached until tokens are added or a part of the tokenizer is replaced. "" for a
        tokenizer with Python parts, which cannot be serialized.
    """
    backend = tokenizer.backend_tokenizer
    split = bool(getattr(tokenizer, "split_special_tokens", False))
    parts = (backend.normalizer, backend.pre_tokenizer, backend.post_processor)
    try:
        state = [None if part is None else part.__getstate__() for part in parts]
        state += [len(tokenizer), split]
        known = _hashes.get(tokenizer)
        if known is None or known[0] != state:
            content = _without_padding(backend).to_str() + ("split" if split else "")
            known = _hashes[tokenizer] = (state, hashlib.sha256(content.encode()).hexdigest())
    except Exception as error:  # tokenizers raises a plain Exception
        if "cannot be serialized" not in str(error):
            raise
        return ""
    return known[1]


def _without_padding(backend: Any) -> Any:
    if backend.truncation is None and backend.padding is None:
        return backend
    from tokenizers import Tokenizer

    copy = Tokenizer.from_str(backend.to_str())
    copy.no_truncation()
    copy.no_padding()
    return copy


@cache
def versions() -> dict[str, str]:
    """Return the versions of the packages that affect results."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


@cache
def _git_commit() -> str:
    """Return the git commit of twotower's checkout; "" for an installed package."""
    folder = Path(__file__).parent
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        tracked = subprocess.run(
            ["git", "-C", str(folder), "ls-files", "--error-unmatch", __file__],
            capture_output=True,
        )
        if tracked.returncode:
            return ""
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()
    except OSError:
        return ""
