"""Where a result comes from, written into every dataset by this one function."""

from __future__ import annotations

import hashlib
import json
import subprocess
from datetime import UTC, datetime
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..models import Model
    from ..prompts import Prompts

PACKAGES = ("twotower", "nnsight", "torch", "transformers", "accelerate", "bitsandbytes", "xarray")


def provenance(model: Model, prompts: Prompts, **settings: Any) -> dict[str, Any]:
    """Attributes that say by what a dataset was made.

    Parameters
    ----------
    model, prompts
        What was measured.
    **settings
        The measure's own arguments; they are written as JSON.

    Returns
    -------
    dict
        Strings and numbers alone, so that any store takes them.
    """
    return {
        "model": model.name,
        "model_revision": model.revision or "",
        "dtype": str(model.dtype).removeprefix("torch."),
        "quantization": model.quantization or "none",
        "device_map": json.dumps(model.device_map),
        "attention_kernel": model.attention_kernel or "",
        **model.about(),
        "tokenizer_hash": _tokenizer_hash(model),
        "task": prompts.task_name,
        "labels": json.dumps(prompts.labels, ensure_ascii=False),
        "prompts_hash": prompts.hash,
        "prompts": json.dumps(prompts.recipe.describe() if prompts.recipe else {}),
        "seed": -1 if prompts.seed is None else prompts.seed,
        "settings": json.dumps(settings, default=str, sort_keys=True),
        "versions": json.dumps(versions()),
        "git_commit": _git_commit(),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _tokenizer_hash(model: Model) -> str:
    if "tokenizer_hash" not in model.cache:
        content = model.tokenizer.backend_tokenizer.to_str()
        model.cache["tokenizer_hash"] = hashlib.sha256(content.encode()).hexdigest()
    return str(model.cache["tokenizer_hash"])


@cache
def versions() -> dict[str, str]:
    """Versions of the packages that numbers depend on."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


@cache
def _git_commit() -> str:
    """Commit of the checkout that twotower runs from; "" for an installed package."""
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
