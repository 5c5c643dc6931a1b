"""Where the shapes and types that functions name are checked; `shapes` holds the checker."""

from __future__ import annotations

CHECKED = [
    *(f"twotower.walk.{name}" for name in ("walk", "scores", "readout", "tensors", "batch")),
    *(f"twotower.sweep.{name}" for name in ("rows", "layout", "sweep")),
    *(f"twotower.edits.{name}" for name in ("attention", "prepared", "prepared_edits")),
    "twotower.models.architecture",
    "twotower.models.check",
]

OPTION = f"--jaxtyping-packages={','.join([*CHECKED, 'shapes.checked'])}"
"""For pytest, run in this folder: jaxtyping checks the functions of these modules."""
