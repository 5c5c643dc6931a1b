"""The checker of the shapes and types that functions name; see `test_shapes`."""

from __future__ import annotations

from beartype import BeartypeConf, beartype

checked = beartype(conf=BeartypeConf(is_pep484_tower=True))
"""beartype, with an int where a float is wanted."""
