"""Pack arrays into a page: rounded to at least the displayed digits, compressed, as text."""

from __future__ import annotations

import base64
import gzip
import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

STEPS = (0.0001, 0.001, 0.01, 0.1, 1.0)
"""Rounding steps; the finest one that fits into 16 bits is used."""

MISSING = -32768


def pack(
    header: Mapping[str, Any], arrays: Mapping[str, np.ndarray], fine: Collection[str] = ()
) -> str:
    """Encode a header and arrays as base64 of gzip: header length, JSON header, values.

    Parameters
    ----------
    header
        Any JSON value.
    arrays
        Floats (row, ...); NaN is kept. Each row is rounded to one of `STEPS`; the header
        records which.
    fine
        Arrays that use the finest step; the others start at the next.
    """
    described, content = {}, []
    for name, array in arrays.items():
        steps_of = STEPS if name in fine else STEPS[1:]
        rows = [rounded(row, steps_of) for row in array]
        steps = [step for step, _ in rows]
        described[name] = {"shape": list(array.shape), "steps": steps}
        content += [values.astype("<i2").tobytes() for _, values in rows]
    text = json.dumps({**header, "arrays": described}, ensure_ascii=False)
    head = text.encode("utf-8", "replace")
    head += b" " * (-len(head) % 2)  # align 16-bit values
    return compressed(len(head).to_bytes(4, "little") + head + b"".join(content))


def compressed(content: bytes) -> str:
    """Return base64 of gzip; equal content gives equal text."""
    return base64.b64encode(gzip.compress(content, 9, mtime=0)).decode()


def rounded(array: np.ndarray, steps: Sequence[float] = STEPS) -> tuple[float, np.ndarray]:
    """Return the finest step that fits, and values in steps (`MISSING` for NaN)."""
    finite = np.isfinite(array)
    most = float(np.abs(array[finite]).max()) if finite.any() else 0.0
    step = next((s for s in steps if most / s < -MISSING - 1), steps[-1])
    top = -MISSING - 1
    whole = np.clip(np.round(np.where(finite, array, 0) / step), -top, top)
    return step, np.where(finite, whole, MISSING).astype(np.int16)
