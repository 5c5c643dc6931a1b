"""The checker of the shapes and types that functions name, and where it is used."""

from __future__ import annotations

from beartype import BeartypeConf, beartype

checked = beartype(conf=BeartypeConf(is_pep484_tower=True))
"""beartype, with an int where a float is wanted."""

CHECKED = [
    *(f"twotower.walk.{name}" for name in ("walk", "scores", "readout", "tensors", "batch")),
    *(f"twotower.sweep.{name}" for name in ("rows", "layout", "sweep")),
    *(f"twotower.edits.{name}" for name in ("attention", "prepared", "prepared_edits")),
    "twotower.models.architecture",
    "twotower.models.check",
]
OPTION = f"--jaxtyping-packages={','.join([*CHECKED, 'shapes.checked'])}"
"""For pytest, run in this folder: jaxtyping checks the functions of these modules."""
